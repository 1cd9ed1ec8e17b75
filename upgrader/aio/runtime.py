# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance on an asyncio loop: accepts, serves, freezes, and resumes or ends.

asyncio is one thread, so a migration inside one callback suspends every task at its await point.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from upgrader.aio.all_connections import AllConnections
from upgrader.aio.loop_signals import AsyncioSignals
from upgrader.aio.waiting import cancel, next_event
from upgrader.errors import BusyWork, DeclarationError
from upgrader.instance.base import Ended
from upgrader.instance.declared_state import DeclaredState
from upgrader.instance.destination_side import refused_by_check
from upgrader.instance.parts import InstanceParts
from upgrader.protocol.collector import no_collection
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.aio import replays, table_rounds, two_waits
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.frozen import Moving
    from upgrader.instance.live_source import MigrationRequest
    from upgrader.instance.turns import Settled
    from upgrader.protocol import image, switchover, varlink_types, wording
else:
    two_waits = later("upgrader.aio.two_waits")
    replays = later("upgrader.aio.replays")
    table_rounds = later("upgrader.aio.table_rounds")
    switchover = later("upgrader.protocol.switchover")
    varlink_types = later("upgrader.protocol.varlink_types")
    wording = later("upgrader.protocol.wording")

#: What `serve` runs beside the connections: a coroutine function that gets each declared state by the
#: annotation of a parameter.
Task = Callable[..., Coroutine[Any, Any, object]]

_AT_ONCE = 0.05  # seconds in which handlers of adopted connections come to their first wait
_GRACE = 1.0  # seconds for what a replaced instance does at its end, however late it is
_log = logging.getLogger("upgrader")


class AsyncioRuntime:
    """Runs the parts of an instance on the running loop; implements `interfaces.Loop`."""

    def __init__(self, parts: InstanceParts) -> None:
        self.connections = AllConnections(parts)
        self.replaced = False  #: another instance owns all that has moved; what is left is drained
        #: Of `time.monotonic`: by then a process that was told to end should be gone.
        self.deadline = float("inf")
        self._parts = parts
        self._declarations = parts.declarations
        self._called = False
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._requests: asyncio.Queue[MigrationRequest | Execution] = asyncio.Queue()
        self._tasks: list[asyncio.Task[object]] = []
        self._replays: replays.Replays | None = None
        self._replaying: asyncio.Task[None] | None = None
        parts.report.connections_open = self.connections.all_open
        parts.report.replays = self._count_replays

    @property
    def begun(self) -> bool:
        """Whether `serve` was called."""
        return self._declarations.serving

    async def serve(self, tasks: Sequence[Task]) -> Ended:
        """Load, serve and end; see `Instance.serve`."""
        parts = self._parts
        if self._called:
            raise DeclarationError("serve()", "is called twice")
        self._called = True
        wanted = [(task, self._declarations.arguments(task)) for task in tasks]
        self.connections.host()
        parts.answering.prepare(
            lambda request: self._loop.call_soon_threadsafe(self._requests.put_nowait, request),
            self._wait_for_reload,
            lambda: asyncio.run_coroutine_threadsafe(self._settle(), self._loop).result(),
            parts.destination,
            now=parts.destination.live,
        )
        signals = AsyncioSignals(parts, self._stop, self._wait_for_reload)
        try:
            beside = await self._prepare_beside_source()
            loaded = parts.destination.load()
            if not beside:
                await self._call(self._declarations.preparations)
            self.connections.prepare(loaded)
            await self._call(self._declarations.checks)
            signals.listen()
            parts.destination.commit(loaded, lambda: self.connections.adopt(loaded))
        except Exception as error:
            parts.destination.refuse(error)
            raise
        self._begin_tasks(wanted)
        await self._open(lambda: parts.destination.settle(loaded))
        parts.open(signals.heed_later)
        self._loop.call_later(parts.report.parameters.insurance, self._trust)
        try:
            ended = await self._until_the_end()
            if ended is Ended.MIGRATED and self._declarations.farewells:
                now, patience = time.monotonic(), parts.report.parameters.drain_timeout
                await self._two_waits.say_farewell(
                    max(min(self.deadline, now + patience), now + _GRACE)
                )
            return ended
        finally:
            signals.restore()

    async def _until_the_end(self) -> Ended:
        while True:
            event = await next_event(self._stop, self._requests, self._tasks)
            if event is None or isinstance(event, BaseException):
                ended = await self._retire(event)
                if event and ended is Ended.STOPPED:
                    raise event
                return ended
            if await self._migrate(event):
                return Ended.MIGRATED

    def _count_replays(self) -> varlink_types.ReplayCounts:
        here, hosted = self._replays, self.connections.hosted.values()
        return varlink_types.ReplayCounts(
            here.moved if here else 0,
            here.refused if here else 0,
            here.waiting if here else 0,
            sum(each.suspended for each in hosted),
            sum(each.in_hand()[0] for each in hosted),
        )

    # The beginning

    async def _prepare_beside_source(self) -> bool:
        """Prepare while the source serves on; False if that is still to be done."""
        destination, preparations = self._parts.destination, self._declarations.preparations
        if not preparations or not destination.borrow():
            return False
        preparing = self._loop.create_task(self._call(preparations))
        gone = asyncio.Event()

        lines = destination.waiting

        def stop_watching() -> None:
            for line in lines:
                self._loop.remove_reader(line)

        def give_up() -> None:
            stop_watching()
            gone.set()
            preparing.cancel()

        for line in lines:
            self._loop.add_reader(line, give_up)
        try:
            await preparing
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
        finally:
            stop_watching()
        if gone.is_set():
            destination.nobody_waits()
        return True

    async def _call(self, checks: Sequence[Callable[..., Any]]) -> None:
        """Call what may refuse this instance."""
        for check in checks:
            try:
                result = check(**self._declarations.values(check))
                if inspect.isawaitable(result):
                    await result
            except Exception as error:
                raise refused_by_check(check, error) from error

    def _wait_for_reload(self) -> None:
        """In another thread: have the callbacks run, and wait for them."""
        asyncio.run_coroutine_threadsafe(self._reload(), self._loop).result()

    def _trust(self) -> None:
        if not self._parts.destination.trust():
            self._loop.call_later(1, self._trust)

    async def _reload(self) -> None:
        for callback in self._declarations.reloads:
            result = callback(**self._declarations.values(callback))
            if inspect.isawaitable(result):
                await result

    async def _open(self, settle: Callable[[], None]) -> None:
        """Begin to serve, once all handlers of what was adopted wait for something; `settle` comes
        after that, but not late."""
        limit = self._parts.report.parameters.downtime_limit
        with no_collection():
            slow = late = await self.connections.safe_points.all_come(min(limit, _AT_ONCE))
            if slow:
                settle()
                late = await self.connections.safe_points.all_come(limit - _AT_ONCE)
        if late:
            _log.warning(
                "%d handlers of adopted connections have not come to their first wait within"
                " downtime-limit: the others go on without them", late,
            )  # fmt: skip
        if arrivals := self.connections.take_arrivals():
            # In a task: this instance can be asked meanwhile.
            parameters = self._parts.report.parameters
            self._replays = replays.Replays(
                arrivals, parameters.replay_timeout, parameters.websocket_spread
            )
            self._replaying = self._loop.create_task(self._replay(self._replays))
        else:
            self.connections.let_in()
        if not slow:
            settle()

    async def _replay(self, beginning: replays.Replays) -> None:
        """Have the handlers of what has no end begin anew, then let everybody in."""
        try:
            replayed = await beginning.run()
        finally:
            self.connections.let_in()
        report = self._parts.report
        message = (
            f"generation {report.generation} goes on with {replayed.moved} connections without an end,"
            f" whose handlers began anew in {replayed.seconds:.3f} s; {replayed.refused} have to dial"
            " again"
        )
        report.done("destination", "replay", message)

    async def _all_let_in(self, *, last: bool = False) -> None:
        """Wait for the end of that; no handler takes longer than a few seconds. `last`: this instance
        ends."""
        if self._replaying:
            await asyncio.wait([self._replaying])
        if self._replays and last:
            await self._replays.end()

    def _begin_tasks(self, wanted: Sequence[tuple[Task, dict[str, DeclaredState[Any]]]]) -> None:
        self._tasks = [
            self._loop.create_task(
                _run(task, {name: declared.value for name, declared in arguments.items()}),
                name=getattr(task, "__name__", None),
            )
            for task, arguments in wanted
        ]

    # The end

    async def _retire(self, failure: BaseException | None) -> Ended:
        await self._all_let_in(last=True)
        source = self._parts.source
        parks, deadline = source.told_to_stop(failed=failure is not None)
        self.deadline = deadline
        if parks:
            await self._two_waits.come_to_a_stop(deadline, for_good=True)
            if self._park():
                await cancel(self._tasks, deadline)
                return Ended.MIGRATED
        else:
            self._two_waits.hold(
                for_good=True, nobody_follows=True
            )  # a newcomer is refused at once
            source.leave()
            await self._two_waits.end_here(deadline, for_good=True)
        source.leave()
        await self._drain(deadline)
        return Ended.STOPPED

    @functools.cached_property
    def _two_waits(self) -> two_waits.TwoWaits:
        return two_waits.TwoWaits(
            self._parts,
            self.connections.safe_points,
            self._stop,
            self.connections.handled,
            self.connections.hosted,
        )

    async def _settle(self) -> Settled:
        return await self._two_waits.settle()

    def resume(self) -> None:
        """As if nothing had happened."""
        self._two_waits.resume()

    async def _execute(self, execution: Execution) -> None:
        """Become the new version; returns only if that fails, and this instance serves on."""
        parameters = self._parts.report.parameters
        patience = parameters.drain_timeout + parameters.downtime_limit
        await self._two_waits.come_to_a_stop(time.monotonic() + patience, for_good=False)
        self._parts.source.execute(execution, self)

    async def _migrate(self, request: MigrationRequest | Execution) -> bool:
        """Give everything to a live destination; False if this instance serves on."""
        from upgrader.instance.live_source import (
            MigrationRequest,  # since it answers, it has been loaded
        )

        await self._all_let_in()
        if not isinstance(request, MigrationRequest):
            await self._execute(request)
            return False
        if copying := self._parts.source.copy(request, self):
            await table_rounds.copy_tables(copying, request.sock, self._stop)
            if not self._parts.source.copied(copying):
                return False
        await self._come_to_rest(request.sock)
        parameters = self._parts.report.parameters
        migration = self._parts.source.give(
            request, self
        )  # nothing else runs meanwhile: the freeze
        if migration.state is switchover.Source.SERVING:
            return False
        self.deadline = time.monotonic() + parameters.live_drain_timeout
        self._parts.report.drains_until = time.time() + parameters.live_drain_timeout
        draining = self._loop.create_task(self._drain_rest())
        while migration.state is switchover.Source.COMMITTED:
            migration.side.feed(await asyncio.wrap_future(migration.told))
        if migration.state is switchover.Source.PARKED:
            # Restart= brings all back, once this process is gone.
            draining.cancel()
            return True
        await draining
        if self._replays:
            await self._replays.end()
        self._tell_in_hand()
        migration.side.feed(
            switchover.Event.STOP if self._stop.is_set() else switchover.Event.DRAINED
        )
        return True

    def _tell_in_hand(self) -> None:
        """Say what handlers wanted to send to clients that had moved: nobody gets it."""
        messages, connections = self.connections.in_hand()
        if messages:
            _log.warning(
                "in hand, and lost: %s to %s that had moved",
                wording.counted(messages, "message"), wording.counted(connections, "connection"),
            )  # fmt: skip

    async def _come_to_rest(self, channel: socket.socket) -> None:
        """Have everything wait for the freeze, or be told that the destination has ended or is
        cancelled: it has nothing to say now."""
        news = asyncio.Event()
        self._loop.add_reader(channel, news.set)
        try:
            await self._two_waits.come_to_rest(news)
        finally:
            self._loop.remove_reader(channel)

    def give_up(self) -> None:
        """Nothing that has moved is touched any more; the rest is drained."""
        self.replaced = True
        self.connections.give_up()

    def let_go(self) -> None:
        """Close our copies of what has moved."""
        self.connections.close_copies()

    async def _drain_rest(self) -> None:
        """What could not move ends after what it is at, by the deadline or `stop`."""
        if suspended := self._count_replays().suspended:
            who = wording.counted(suspended, "handler")
            message = f"{who} of connections that have moved: suspended until this process ends"
            self._parts.report.done("source", "replay", message)
        if self.connections.all_open():
            self._parts.answering.drain()
        await cancel(self._tasks, self.deadline)
        await self.connections.all_ended(self.deadline, self._stop)

    def _park(self) -> bool:
        # From here to the end of park() no other callback runs: this is the freeze.
        source = self._parts.source
        self._two_waits.tell_noise()
        cut = list(self._parts.turns.running.values())
        with no_collection():
            source.frozen = source.park(*self.connections.freeze(), cut)
            if source.frozen:
                self.connections.drop()
        return source.frozen

    def freeze(self) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes. Raises BusyWork."""
        if busy := self._two_waits.busy():
            raise BusyWork(busy)
        self._two_waits.require_quiet()
        return self.connections.freeze()

    async def _drain(self, deadline: float) -> None:
        """End all handlers, with their `finally` blocks, and send what is unsent."""
        self._parts.turns.open()
        await self.connections.end(self._tasks, deadline)


async def _run(task: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Run a task. What is no coroutine function has done its work when it returns."""
    result = task(**arguments)
    if inspect.isawaitable(result):
        await result
