# SPDX-License-Identifier: LGPL-2.1-or-later
"""Report the phases of one instance's migrations as they happen."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from upgrader.codes import Code
from upgrader.protocol.phase import Decision, Phase
from upgrader.protocol.varlink_types import Last, Loaded, Migration


class News(msgspec.Struct, frozen=True):
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
        "PREFLIGHT": "1" if migration.preflight else "",
        "REASON": migration.reason,
        "PID": str(migration.pid),
    }


_DECISIONS = {
    Phase.COMMITTED: Decision.COMMITTED,
    Phase.DONE: Decision.COMMITTED,
    Phase.FAILED: Decision.ABORTED,
    Phase.CANCELLED: Decision.ABORTED,
    Phase.PREFLIGHT: Decision.ABORTED,
}


class Phases:
    """The migration under way, or the last one. Any thread may tell, any may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decision = threading.Condition(self._lock)
        self._last = Migration()
        self._upgrade = self._side = ""
        self._code: Code | None = None
        self.origin = Loaded()  #: how this instance came to be
        self.last_upgrade = Migration()  #: the last that was done or has failed, and no preflight
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

    @property
    def last(self) -> Last:
        """The same upgrade as it was decided: the id, the side and the code besides."""
        with self._lock:
            return self._decided()

    def wait_decided(self, upgrade: str, seconds: float) -> Last:
        """The last upgrade, once it is decided or is another one, or after `seconds`."""
        with self._lock:
            self._decision.wait_for(
                lambda: self._upgrade != upgrade or self._last.phase in _DECISIONS, seconds
            )
            return self._decided()

    def _decided(self) -> Last:
        each = self._last
        return Last(
            id=self._upgrade,
            side=self._side,
            decision=_DECISIONS.get(each.phase, Decision.NONE),
            code=self._code or "",
            reason=each.reason,
            mode=each.mode,
            pause=each.pause,
            fds=each.fds,
            bytes=each.bytes,
            left_behind=each.left_behind,
            source=each.source,
            destination=each.destination,
        )

    def on_change(self, call: Callable[[News], None]) -> None:
        """Have each phase told to `call`, in the thread in which it begins."""
        self._changed = call

    def begin(self, mode: str, source: int, *, upgrade: str = "", **facts: Any) -> None:
        """A migration begins, with this instance as the source."""
        self._begin = time.monotonic()
        migration = Migration(Phase.SETUP, mode, source, began=round(time.time(), 3), **facts)
        with self._lock:
            news = self._note(migration, upgrade, "source")
        self._tell(news)

    def enter(self, phase: Phase, *, code: Code | None = None, **facts: Any) -> None:
        """The next phase of the migration under way; ignored if there is none.

        `code`: why it was aborted.
        """
        with self._lock:
            if self._last.phase.ended:
                return
            migration = msgspec.structs.replace(self._last, phase=phase, **facts)
            news = self._note(migration, self._upgrade, self._side, code)
        self._tell(news)

    def again(self) -> None:
        """The phase under way is tried once more, which is news."""
        self.enter(self.now.phase)

    def loaded(self, origin: Loaded, migration: Migration | None, upgrade: str = "") -> None:
        """How this instance came to be, told once at its beginning."""
        self.origin = origin
        if migration:
            with self._lock:
                news = self._note(migration, upgrade, "destination")
            self._tell(news)

    def _note(
        self, migration: Migration, upgrade: str, side: str, code: Code | None = None
    ) -> News:
        another = self._upgrade != upgrade
        self._upgrade, self._side, self._code = upgrade, side, code
        now = time.monotonic()
        if self._begin and not self._last.phase.ended:
            took = round(now - self._entered, 6)
            before = self._last.times.get(self._last.phase, 0.0)
            times = {**self._last.times, self._last.phase: round(before + took, 6)}
            migration = msgspec.structs.replace(migration, times=times)
        self._entered = now
        self._last = migration = self._timed(migration, ending=True)
        if migration.phase in (Phase.DONE, Phase.FAILED) and not migration.preflight:
            self.last_upgrade = migration
        self._number += 1
        if another or migration.phase in _DECISIONS:  # nobody is woken in the pause
            self._decision.notify_all()
        return News(migration, self._number)

    def _tell(self, news: News) -> None:
        if self._changed:
            self._changed(news)

    def _timed(self, migration: Migration, *, ending: bool = False) -> Migration:
        if not self._begin or (migration.phase.ended and not ending):
            return migration
        seconds = round(time.monotonic() - self._begin, 6)
        return msgspec.structs.replace(migration, seconds=seconds)
