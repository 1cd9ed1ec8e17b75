# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two waits before a freeze, without asyncio: all are served while what runs ends, then new turns
are held."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from upgrader.instance.parts import InstanceParts

if TYPE_CHECKING:
    from upgrader.instance.author_calls import AuthorRound


class WaitForWork:
    """Those of one migration or restart, until `close`.

    First everybody is served while the turns that run now end, and the author's functions that come
    before a freeze; then all are held for `downtime-limit`, and let go again if one still runs, until
    the last try.
    """

    def __init__(
        self,
        parts: InstanceParts,
        changed: Callable[[], object],
        quiesce: Callable[[], AuthorRound],
        resume: Callable[[], object],
        *,
        until: float,
        pauses: Iterator[float],
        deadline: float,
        stops: bool = False,
        unsent: Callable[[], bool] = lambda: False,
    ) -> None:
        """`changed`: called from any thread when it is time to look again. `quiesce` begins a round of the
        author's functions, `resume` undoes it. The first wait goes on `until`; `pauses` are seconds before each further
        try, of which none goes beyond `deadline` (both of `time.monotonic`). If this instance `stops`,
        turns that run during all of the first wait are not waited for any more. The first wait is also
        for what is `unsent` and cannot move."""
        self.until = until  #: when it is time to look again at the latest
        self._source = parts.source
        self._progress = parts.report.progress
        self._turns = parts.turns
        self._parameters = parts.report.parameters
        self._changed = changed
        self._pauses = pauses
        self._deadline = deadline
        self._stops = stops
        self._unsent = unsent
        self._waits_for = self._turns.begun()
        self._stuck: frozenset[int] | None = None  # once the first wait is over
        self._turns.watch(changed)
        self._quiesce = quiesce
        self._resume = resume
        self.round = quiesce()  #: the last one

    def close(self) -> None:
        """Wait no more; what is held stays held."""
        self._turns.unwatch(self._changed)

    def over(self) -> bool:
        """Whether nothing runs, and no turn can begin, or the last try is over; else it is tried again
        when something has ended, or later."""
        turns, limit = self._turns, self._parameters.downtime_limit
        now = time.monotonic()
        if now < self.until and (turns.run_still(self._waits_for) or self.round.late):
            return False
        if now < self.until and self._stuck is None and self._unsent():
            return False
        if self._stuck is None:  # what is refused has had no less time than the rest
            self._stuck = turns.begun() & self._waits_for if self._stops else frozenset()
        self._source.holds(True)
        until = min(now + limit, self._deadline) if self._stops else now + limit
        self.round = self._quiesce()  # those who empty a queue may take turns
        quiet = self.round.wait(until - time.monotonic())
        turns.close()
        if turns.wait_idle(until - time.monotonic(), self._stuck) and quiet:
            return True
        pause = next(self._pauses, None)
        if pause is None or time.monotonic() + pause + limit > self._deadline:
            return True
        self._source.holds(False)
        self._resume()
        kinds = turns.kinds(but=self._stuck)
        turns.open(kinds)  # what has kept this try from being the last is held first
        self._waits_for = turns.of(kinds) - self._stuck
        self.until = time.monotonic() + pause
        if not self._stops:
            self._progress.again()
        return False
