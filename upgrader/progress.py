# SPDX-License-Identifier: LGPL-2.1-or-later
"""The phases of one instance's migrations as they happen, for whoever asks; decides nothing."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from upgrader.description import Migration, Phase


@dataclass(frozen=True, slots=True)
class News:
    """A migration as it stood when something was new; later news have higher numbers."""

    migration: Migration
    number: int


def fields(migration: Migration) -> dict[str, str]:
    """What the journal gets of a migration, by the names of its fields without UPGRADER_."""
    times = " ".join(f"{phase}={seconds:.6f}" for phase, seconds in migration.times.items())
    return {
        "MODE": migration.mode,
        "SOURCE": str(migration.source),
        "DESTINATION": str(migration.destination),
        "SECONDS": f"{migration.seconds:.6f}",
        "PAUSE_USEC": str(round(migration.pause * 1e6)),
        "FDS": str(migration.fds),
        "BYTES": str(migration.bytes),
        "LEFT_BEHIND": str(migration.left_behind),
        "TIMES": times,
    }


class Progress:
    """The migration under way, or the last one. Any thread may tell, any may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = Migration()
        self._number = 0
        self._begin = self._entered = 0.0  # of `time.monotonic`
        self._changed: Callable[[News], None] | None = None

    @property
    def now(self) -> Migration:
        """As it stands; `seconds` grows until it has ended."""
        return self.news.migration

    @property
    def news(self) -> News:
        """As it stands, and which news that includes."""
        with self._lock:
            return News(self._timed(self._last), self._number)

    def on_change(self, call: Callable[[News], None]) -> None:
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
            now = time.monotonic()
            if self._begin and not self._last.phase.ended:
                took = round(now - self._entered, 6)
                times = {**self._last.times, self._last.phase: took}
                migration = msgspec.structs.replace(migration, times=times)
            self._entered = now
            self._last = migration = self._timed(migration, ending=True)
            self._number += 1
            news = News(migration, self._number)
        if self._changed:
            self._changed(news)

    def _timed(self, migration: Migration, *, ending: bool = False) -> Migration:
        if not self._begin or (migration.phase.ended and not ending):
            return migration
        seconds = round(time.monotonic() - self._begin, 6)
        return msgspec.structs.replace(migration, seconds=seconds)
