# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two waits before a freeze: all are served while work in hand ends, then new work is held.

Nothing is frozen here, and nothing is cut: what is at something when the waits are over is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, TypeVar

from upgrader.aio.safe_points import SafePoints
from upgrader.aio.waiting import first
from upgrader.instance.author_calls import AuthorCalls, AuthorRound
from upgrader.instance.parts import InstanceParts
from upgrader.instance.turns import PAUSES, Settled

if TYPE_CHECKING:
    from upgrader.aio.handled_connection import HandledConnection
    from upgrader.aio.handled_listener import HandledListener
    from upgrader.aio.hosted_connection import HostedConnection
    from upgrader.aio.hosted_listener import HostedListener

T = TypeVar("T")

_FOR_TURNS = 0.2  # of the time there is to come to a stop
_SETTLED = 5.0  # seconds in which a first wait counts for the restart that follows it


@dataclass(frozen=True, slots=True)
class Stuck:
    """What was at the same thing during all of a first wait: no later wait is for that."""

    connections: frozenset[object] = frozenset()  # with a handler
    hosted: frozenset[HostedConnection] = frozenset()
    turns: frozenset[int] = frozenset()


NOTHING = Stuck()


class TwoWaits:
    """Those of one instance on an asyncio loop."""

    def __init__(
        self,
        parts: InstanceParts,
        safe_points: SafePoints,
        stop: asyncio.Event,
        handled: Mapping[str, HandledListener],
        hostings: Mapping[str, HostedListener],
    ) -> None:
        """`stop`: set once this instance is told to stop; `handled`, `hostings`: by listener."""
        self._handled = handled
        self._hostings = hostings
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        self._safe_points = safe_points
        self._stop = stop
        self._held = False
        self._live = False
        self._calls = AuthorCalls(
            parts.declarations, lambda work: asyncio.run_coroutine_threadsafe(work, self._loop)
        )
        self._round: AuthorRound | None = None
        self._stuck = NOTHING
        self._stuck_until = 0.0

    # For a destination that is there already

    async def come_to_rest(self, news: asyncio.Event) -> None:
        """Hold all that moves at its safe points. If it is not all there, the freeze refuses.

        First everybody is served while what runs now comes to an end; then all are held for
        `downtime-limit`. What has begun meanwhile may take longer: all are let go, but for what keeps
        beginning, and it is tried again a little later. No wait goes on if this instance is told to stop, or if there is `news`
        of the destination, which has ended or is cancelled then.
        """
        self._live = True
        parameters = self._parts.report.parameters
        last = time.monotonic() + parameters.migration_timeout / 2  # the rest is for the image
        await self._let_end(
            min(last, time.monotonic() + parameters.drain_timeout), NOTHING, self._stop, news
        )
        for pause in (*PAUSES, float("inf")):
            self.hold(for_good=False)
            until = time.monotonic() + parameters.downtime_limit
            await self._collect(until, drained=True, quiesces=True)
            over = self._stop.is_set() or news.is_set()
            if over or time.monotonic() + pause > last or not self.busy():
                return
            await self._let_go_on(pause, NOTHING, self._stop, news, everything=False)
            self._parts.report.progress.again()

    # Where nobody drains afterwards: a restart, an exec

    async def settle(self) -> Settled:
        """The first wait of a restart that is about to be asked for, for `drain-timeout` at most."""
        stuck = await self._let_end(
            time.monotonic() + self._parts.report.parameters.drain_timeout, NOTHING, self._stop,
            everything=True,
        )  # fmt: skip
        self._stuck, self._stuck_until = stuck, time.monotonic() + _SETTLED
        return Settled(self.busy(stuck), [each.describe() for each in stuck.hosted])

    async def come_to_a_stop(self, deadline: float, *, for_good: bool) -> None:
        """Hold everything at its safe points, by the deadline (of `time.monotonic`): all are served
        until then, but for holds of `downtime-limit` at most.

        What cannot move ends in the last hold, and is told to if the stop is `for_good`. What was
        stuck during all of the first wait is not waited for any more while others are held.
        """
        self._live = False
        limit = self._parts.report.parameters.downtime_limit
        known = self._stuck if time.monotonic() < self._stuck_until else NOTHING
        stuck, first_ends = known, deadline - limit
        if first_ends > time.monotonic():
            stuck = await self._let_end(first_ends, known, everything=True)
        for pause in chain(PAUSES, repeat(PAUSES[-1])):
            now = time.monotonic()
            until = min(now + limit, deadline)
            room = deadline - 2 * limit - now  # before the last try
            if room > PAUSES[0] / 2:
                self.hold(for_good=False)
                if not await self._collect(until, stuck, quiesces=True):
                    await self._let_go_on(min(pause, room), stuck, everything=True)
                    continue
            self.hold(for_good=for_good)
            await self.end_here(until, stuck, for_good=for_good, last=room <= PAUSES[0] / 2)
            return

    async def end_here(
        self, deadline: float, stuck: Stuck = NOTHING, *, for_good: bool, last: bool = False
    ) -> None:
        """While everything is held, have what cannot move come to its end, by the deadline (of
        `time.monotonic`). `last`: nothing has been held before, so what comes before a freeze does."""
        staying = [handled for name, handled in self._handled.items() if not self._crosses(name)]
        for handled in staying:
            handled.finish()
        for handled in self._handled.values():
            handled.finish_staying()
        await self._collect(deadline, stuck, for_good=for_good, quiesces=last)
        for handled in staying:
            await handled.all_ended(deadline)

    async def say_farewell(self, deadline: float) -> None:
        """Have run what is declared for the end of a replaced instance, by the deadline (of
        `time.monotonic`)."""
        round_ = await self.called(self._calls.replaced(), deadline)
        round_.log("the end of a replaced instance")

    # What both need

    def hold(self, *, for_good: bool, nobody_follows: bool = False) -> None:
        """Accept no more, and let no connection leave its safe point."""
        self._held = True
        self._parts.source.holds(True)
        self._safe_points.close()
        for name, handled in self._handled.items():
            handled.ask_tls(live=self._live, trust=self._parts.answering.tls_trust(name))
            handled.hold()
        for name, hosting in self._hostings.items():
            answering = self._parts.answering
            speaks = self._live and answering.speaks_tls(name)
            hosting.ask_tls(live=self._live, trust=answering.tls_trust(name), speaks=speaks)
            reader = 0 if nobody_follows else answering.reader(name)
            hosting.hold(for_good=for_good, crosses=self._crosses(name), reader=reader)

    def resume(self) -> None:
        """As if nothing had happened."""
        self._held = False
        self._parts.source.holds(False)
        self._calls.resumed()
        self._go_on(frozenset(), frozenset())

    def _go_on(self, turns: frozenset[str], listeners: frozenset[str]) -> None:
        """Hold nothing but the turns of these kinds and the connections of these listeners."""
        self._parts.turns.open(turns)
        self._safe_points.open(listeners)
        for handled in self._handled.values():
            handled.resume()
        for hosting in self._hostings.values():
            hosting.resume()

    async def _let_go_on(
        self, pause: float, stuck: Stuck, *events: asyncio.Event, everything: bool
    ) -> None:
        """Between two tries: what has kept this one from being the last is held first, while all others
        go on, until it has ended; for `pause` seconds at most, or until one of the events."""
        deadline = time.monotonic() + pause
        moving = self._moving(everything=everything)
        busy = self._safe_points.busy_among(moving)
        turns = self._parts.turns
        listeners = frozenset(each.listener for each in busy.keys() - stuck.connections)
        listeners |= turns.listeners(but=stuck.turns)
        kinds = turns.kinds(but=stuck.turns)
        self._held = False
        self._parts.source.holds(False)
        self._calls.resumed()
        self._go_on(kinds, listeners)
        if not kinds and not listeners:
            await self._until(asyncio.sleep(pause), *events)
            return
        connections = [each for each in moving if each.listener in listeners]
        await self._until(
            asyncio.gather(
                self._safe_points.all_safe(set(connections) - stuck.connections, deadline),
                self._turns_end(turns.of(kinds, listeners) - stuck.turns, deadline),
            ),
            *events,
        )

    async def _until(self, work: Awaitable[T], *events: asyncio.Event) -> T | None:
        """Wait for some work, or until one of the events: then it is cancelled, and None."""
        waiting = asyncio.ensure_future(work)
        ended = asyncio.Event()
        waiting.add_done_callback(lambda _: ended.set())
        await first(None, ended, *events)
        waiting.cancel()
        await asyncio.wait([waiting])
        return None if waiting.cancelled() else waiting.result()

    def busy(self, stuck: Stuck | None = None) -> list[str]:
        """The turns and handlers that are between two safe points, for people; those that are
        `stuck`, if that is given."""
        now = time.monotonic()
        moving = self._moving(everything=stuck is not None)
        busy = self._safe_points.busy_among(moving)
        turns = self._parts.turns.begun()
        functions = self._round.late if self._round else []
        requests = [
            (name, each)
            for name, hosting in self._hostings.items()
            if stuck is not None or self._crosses(name)
            for each in hosting.at_work()
        ]
        if stuck:
            busy = {each: since for each, since in busy.items() if each in stuck.connections}
            turns &= stuck.turns
            requests = [(name, each) for name, each in requests if each in stuck.hosted]
        return [
            *self._parts.turns.shown(turns),
            *(
                f"the handler of {connection.address} at {connection.listener!r}"
                f" for {now - since:.1f} s"
                for connection, since in busy.items()
            ),
            *(f"{each.describe()} at {name!r}" for name, each in requests),
            *functions,
        ]

    def _crosses(self, backend: str) -> bool:
        return self._parts.answering.crosses(backend)

    def _moving(self, *, everything: bool = False) -> list[HandledConnection]:
        """The connections that have to be at a safe point to move; or `everything`, because what
        does not move is cut."""
        return [
            connection
            for name, handled in self._handled.items()
            if everything or (self._crosses(name) and not handled.drains)
            for connection in handled.connections
        ]

    async def _let_end(
        self, deadline: float, but: Stuck, *events: asyncio.Event, everything: bool = False
    ) -> Stuck:
        """Serve on until all that is at something now has come to its end, or to a safe point; until
        the deadline; or until one of the events. Returns what has not, with `but`, which is not
        waited for. `everything`: also what may be left behind, because nobody drains it then."""
        moving = self._moving(everything=everything)
        held = [h for name, h in self._hostings.items() if everything or self._crosses(name)]
        connections = set(moving) - but.connections
        for connection in moving:  # who reads slowly keeps no handler busy
            connection.hold()

        async def wait() -> Stuck:
            handled, turns, _, hosted, _ = await asyncio.gather(
                self._safe_points.all_passed(connections, deadline),
                self._turns_end(self._parts.turns.begun() - but.turns, deadline),
                self._quiesce(deadline),
                asyncio.gather(
                    *(each.all_passed(deadline, but.hosted, everything=everything) for each in held)
                ),
                asyncio.gather(*(each.background_ended(deadline) for each in held if everything)),
            )
            return Stuck(but.connections | handled, but.hosted.union(*hosted), but.turns | turns)

        stuck = await self._until(wait(), *events)
        for connection in moving if not self._held else ():
            connection.resume()
        return stuck or but

    async def _turns_end(self, numbers: frozenset[int], deadline: float) -> frozenset[int]:
        """Wait until these have ended, or for the deadline; returns those that have not."""
        turns = self._parts.turns
        changed = asyncio.Event()

        def told() -> None:
            self._loop.call_soon_threadsafe(changed.set)

        turns.watch(told)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                while turns.run_still(numbers):
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            pass
        finally:
            turns.unwatch(told)
        return numbers & turns.begun()

    async def _collect(
        self, deadline: float, stuck: Stuck = NOTHING, *, for_good: bool = False,
        drained: bool = False, quiesces: bool = False,
    ) -> bool:  # fmt: skip
        """Wait until all that moves is at safe points and no turn runs, or for the deadline; returns
        whether it is so. `drained`: what is busy may end here afterwards."""
        # No grace here: PID 1 kills at the end of TimeoutStopSec=, and parking comes first.
        handled = set(self._moving(everything=not drained)) - stuck.connections
        await self._safe_points.all_safe(handled, _before_turns(deadline))
        settled = _before_turns(deadline)
        at_one = not self._safe_points.busy_among(handled)
        for hosting in self._hostings.values():
            at_one &= await hosting.settle(
                settled, stuck.hosted, for_good=for_good, drained=drained
            )
        if quiesces:  # before turns are held: those who empty a queue take some
            await self._quiesce(settled)
        # However long a handler is busy, no turn may begin from here on, or be cut in two.
        turns = self._parts.turns
        turns.close()
        await asyncio.sleep(0)  # what a handler has just started begins its turn
        while (running := turns.begun() - stuck.turns) and time.monotonic() < deadline:
            await self._turns_end(running, deadline)  # one that runs may begin another one inside
        return at_one and not running and not (quiesces and self._round and self._round.late)

    async def _quiesce(self, deadline: float) -> None:
        """Have the author's functions run that come before a freeze, for the deadline at most."""
        if not self._parts.declarations.quiesces:
            return
        self._round = await self.called(self._calls.quiesce(), deadline)

    async def called(self, round_: AuthorRound, deadline: float) -> AuthorRound:
        """Wait until all of these have ended, or for the deadline (of `time.monotonic`)."""
        ended = asyncio.Event()

        def told(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                self._loop.call_soon_threadsafe(ended.set)

        for future in round_.futures:
            future.add_done_callback(told)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                while round_.late:
                    await ended.wait()
                    ended.clear()
        return round_

    def require_quiet(self) -> None:
        """Raise QuiesceFailed if a function that comes before a freeze has raised."""
        if self._round:
            self._round.require()

    def tell_noise(self) -> None:
        """Say which of them have not worked out, where that can refuse nothing."""
        if self._round:
            self._round.log("a restart")


def _before_turns(deadline: float) -> float:
    """What is left until a deadline (of `time.monotonic`), but for a part in which turns end."""
    now = time.monotonic()
    return now + max(deadline - now, 0) * (1 - _FOR_TURNS)
