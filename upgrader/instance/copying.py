# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has the tables of a source copied while it serves, paced, until what is left fits the pause.

Whatever the loop is: it calls `step`, and again after as many seconds as that says, or as soon as
something comes on the channel.
"""

import time
from collections.abc import Callable

from upgrader.errors import UpgradeError
from upgrader.instance.live_source import LiveSource
from upgrader.instance.rounds import Rounds
from upgrader.protocol.switchover import Event

#: Pieces on the way: while one is loaded, the next one is there.
_IN_FLIGHT = 2
#: What copying takes in all, of what it takes here: it is sent and loaded besides.
_IN_ALL = 3
#: Seconds that are so short that no further round is worth it.
_SHORT = 0.001
#: As many rounds in a row must leave more than this part of the least that was left before.
_IN_VAIN, _LESS = 3, 0.8
_LATE = 0.01  # seconds that it may catch up on
_WAIT = 1.0  # seconds until it looks again by itself, and tells how far it has come


class Copying:
    """The rounds before one freeze."""

    def __init__(
        self,
        migration: LiveSource,
        rounds: Rounds,
        *,
        limit: float,
        timeout: float,
        bandwidth: float,
        tell: Callable[[Rounds], None] = lambda rounds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: seconds that the last pieces may take, in the pause; `timeout`: seconds in which
        more is copied; `bandwidth`: bytes a second; `tell`: called at the end of each round, and each
        second."""
        self.event: Event | None = None  #: why nothing is to be frozen
        self._migration = migration
        self._rounds = rounds
        self._limit = limit
        self._bandwidth = bandwidth
        self._clock = clock
        self._until = clock() + timeout
        self._tell = tell
        self._told = clock()
        self._next = clock()  # when there may be more
        self._least = float("inf")  # seconds that were left after a round
        self._in_vain = 0  # rounds in a row

    def step(self) -> float | None:
        """Do what is to be done next; returns how many seconds to wait then, None if this is over: the
        freeze may come, or `event` says why not."""
        found = self._migration.look()
        if found is Event.PROGRESS:
            self._migration.side.feed(found)
            return 0.0
        if found is not None:
            self.event = found
            return None
        now = self._clock()
        rounds, in_flight = self._rounds, self._migration.in_flight
        if in_flight >= _IN_FLIGHT or (in_flight and (rounds.at_end or now >= self._until)):
            return _WAIT
        if now >= self._until and not in_flight:
            return None
        if now < self._next:
            return self._next - now
        self._next = max(self._next, now - _LATE)
        if rounds.at_end:
            if self._is_enough():
                return None
            rounds.again()
        return self._work()

    def _work(self) -> float | None:
        rounds = self._rounds
        size, seconds = rounds.bytes, rounds.seconds
        try:
            piece = rounds.work()
        except (UpgradeError, OSError) as error:
            self.event = self._migration.not_sent(error)
            return None
        now = self._clock()
        # Whoever serves gets twice as much of the time as this.
        pause = max((rounds.bytes - size) / self._bandwidth, 2 * (rounds.seconds - seconds))
        self._next = max(self._next + pause, now)
        if rounds.at_end or now >= self._told + _WAIT:
            self._told = now
            self._tell(rounds)
        if piece:
            self._migration.piece = piece
            self.event = self._migration.side.feed(Event.PIECE)
            if self.event:
                return None
        return self._next - now

    def _is_enough(self) -> bool:
        """Whether there is no further round: what is left is short, or becomes hardly less."""
        left = self._rounds.seconds_left * _IN_ALL
        self._in_vain = 0 if left < self._least * _LESS else self._in_vain + 1
        self._least = min(self._least, left)
        fits = left <= self._limit
        return self._rounds.full or (fits and (left <= _SHORT or self._in_vain >= _IN_VAIN))
