# SPDX-License-Identifier: LGPL-2.1-or-later
"""The phases of one instance's migrations as they happen, for whoever asks; decides nothing."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from upgrader.description import Migration, Phase


class Progress:
    """The migration under way, or the last one. Any thread may tell, any may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = Migration()
        self._begin = 0.0  # of `time.monotonic`
        self._changed: Callable[[Migration], None] | None = None

    @property
    def now(self) -> Migration:
        """As it stands; `seconds` grows until it has ended."""
        with self._lock:
            return self._timed(self._last)

    def on_change(self, call: Callable[[Migration], None]) -> None:
        """Have each phase told to `call`, in the thread in which it begins."""
        self._changed = call

    def begin(self, mode: str, source: int, **facts: Any) -> None:
        """A migration begins."""
        self._begin = time.monotonic()
        self._set(Migration(Phase.SETUP, mode, source, began=round(time.time(), 3), **facts))

    def enter(self, phase: Phase, **facts: Any) -> None:
        """The next phase of the migration under way; ignored if there is none."""
        if not self._last.phase.ended:
            self._set(msgspec.structs.replace(self._last, phase=phase, **facts))

    def loaded(self, migration: Migration) -> None:
        """What brought this instance here, told once at its beginning."""
        self._set(migration)

    def _set(self, migration: Migration) -> None:
        with self._lock:
            self._last = migration = self._timed(migration, ending=True)
        if self._changed:
            self._changed(migration)

    def _timed(self, migration: Migration, *, ending: bool = False) -> Migration:
        if not self._begin or (migration.phase.ended and not ending):
            return migration
        seconds = round(time.monotonic() - self._begin, 6)
        return msgspec.structs.replace(migration, seconds=seconds)
