# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance on an asyncio loop: accepts, serves, freezes, and resumes or ends.

asyncio is one thread, so a migration inside one callback suspends every task at its await point.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence, Set
from typing import TYPE_CHECKING, Any

from upgrader.aio.handled_listener import HandledListener
from upgrader.aio.safe_points import SafePoints
from upgrader.aio.waiting import cancel, next_event
from upgrader.errors import BusyWork
from upgrader.instance.base import Ended
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.declarations import DeclaredState
from upgrader.instance.destination_side import refused_by_check
from upgrader.instance.fork_guard import catches
from upgrader.instance.parts import InstanceParts
from upgrader.instance.process import (
    no_collection,
    reload_signals,
    stop_signals,
    unhandled,
)
from upgrader.protocol.kinds import Kind, Standing
from upgrader.protocol.later import later
from upgrader.systemd.journal import JournalOutcome, Priority

if TYPE_CHECKING:
    from upgrader.aio import hosted_listener as hosted_listeners
    from upgrader.aio import replays, two_waits
    from upgrader.instance import save, unit_signals
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.interfaces import Open
    from upgrader.instance.live_source import MigrationRequest
    from upgrader.instance.turns import Settled
    from upgrader.protocol import image, switchover, wording
else:
    two_waits = later("upgrader.aio.two_waits")
    replays = later("upgrader.aio.replays")
    hosted_listeners = later("upgrader.aio.hosted_listener")
    save = later("upgrader.instance.save")
    unit_signals = later("upgrader.instance.unit_signals")
    image = later("upgrader.protocol.image")
    switchover = later("upgrader.protocol.switchover")
    wording = later("upgrader.protocol.wording")

#: What `serve` runs beside the connections: a coroutine function that gets each declared state by the
#: annotation of a parameter.
Task = Callable[..., Coroutine[Any, Any, object]]

_GRACE = 1.0  # seconds for what a replaced instance does at its end, however late it is
_log = logging.getLogger("upgrader")


class AsyncioRuntime:
    """Runs the parts of an instance on the running loop; implements `interfaces.Loop`."""

    def __init__(self, parts: InstanceParts) -> None:
        self.handled: dict[str, HandledListener] = {}
        self.hostings: dict[str, hosted_listeners.HostedListener] = {}
        self.replaced = False  #: another instance owns all that has moved; what is left is drained
        #: Of `time.monotonic`: by then a process that was told to end should be gone.
        self.deadline = float("inf")
        self._parts = parts
        self._declarations = parts.declarations
        self._loop = asyncio.get_running_loop()
        self._safe_points = SafePoints()
        self._stop = asyncio.Event()
        self._requests: asyncio.Queue[MigrationRequest | Execution] = asyncio.Queue()
        self._tasks: list[asyncio.Task[object]] = []
        self._stops: set[int] = set()  # signals
        self._waits = False  # PID 1 waits for the end of a reload that a signal has begun
        self._by_signal: unit_signals.ReloadBySignal | None = None
        self._replays: replays.Replays | None = None
        self._replaying: asyncio.Task[None] | None = None
        parts.report.connections_open = self._connections_open

    @property
    def begun(self) -> bool:
        """Whether `serve` was called."""
        return self._declarations.serving

    async def serve(self, tasks: Sequence[Task]) -> Ended:
        """Load, serve and end; see `Instance.serve`."""
        parts = self._parts
        wanted = [(task, self._declarations.arguments(task)) for task in tasks]
        self.hostings = {
            name: hosted_listeners.HostedListener(
                self._loop, declared, with_state=bool(self._declarations.states)
            )
            for name, declared in self._declarations.protocols.items()
        }
        parts.answering.prepare(
            lambda request: self._loop.call_soon_threadsafe(self._requests.put_nowait, request),
            self._wait_for_reload,
            lambda: asyncio.run_coroutine_threadsafe(self._settle(), self._loop).result(),
            parts.destination,
            now=parts.destination.live,
        )
        supervised = parts.report.supervised
        stops, reloads = stop_signals(supervised), reload_signals(supervised)
        catches(stops | reloads)
        try:
            beside = await self._prepare_beside_source()
            loaded = parts.destination.load()
            if not beside:
                await self._call(self._declarations.preparations)
            for name, hosting in self.hostings.items():
                hosting.prepare([item for item in loaded.adopted if item.listener == name])
            await self._call(self._declarations.checks)
            self._catch(stops, reloads)
            parts.destination.commit(loaded, lambda: self._adopt(loaded))
        except Exception as error:
            parts.destination.refuse(error)
            raise
        await self._open()
        parts.open(self._heed_later)
        self._loop.call_later(parts.report.parameters.insurance, self._trust)
        self._begin_tasks(wanted)
        try:
            ended = await self._until_the_end()
            if ended is Ended.MIGRATED and self._declarations.farewells:
                now, patience = time.monotonic(), parts.report.parameters.drain_timeout
                await self._two_waits.say_farewell(
                    max(min(self.deadline, now + patience), now + _GRACE)
                )
            return ended
        finally:
            for number in self._stops:
                self._loop.remove_signal_handler(number)

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

    def _connections_open(self) -> Sequence[tuple[str, Open]]:
        open_here: list[tuple[str, Open]] = []
        for name, handled in self.handled.items():
            open_here += [(name, each) for each in handled.open_connections]
        for name, hosting in self.hostings.items():
            open_here += [(name, hosted) for hosted in hosting.connections if not hosted.gone]
        return open_here

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

    def _heed_later(self, found: unit_signals.UnitSignals) -> None:
        """In another thread: have the loop handle what the unit names as well."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._heed, found)

    def _heed(self, found: unit_signals.UnitSignals) -> None:
        """Handle what the unit names as well."""
        if self._parts.report.standing in (Standing.SERVING, Standing.MIGRATING):
            catches(found.stops | found.reloads)
            self._waits = found.waits
            self._catch(found.stops - self._stops, unhandled(*found.reloads))

    def _catch(self, stops: Set[int], reloads: Set[int]) -> None:
        for number in stops:
            self._stops.add(number)
            self._end_at(number)
        for number in reloads:
            self._loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        """A signal has asked for a reload."""
        self._by_signal = self._by_signal or unit_signals.ReloadBySignal(
            self._parts.report, self._wait_for_reload
        )
        self._by_signal.came(waits=self._waits)

    def _wait_for_reload(self) -> None:
        """In another thread: have the callbacks run, and wait for them."""
        asyncio.run_coroutine_threadsafe(self._reload(), self._loop).result()

    def _end_at(self, number: int) -> None:
        """End at a signal; a handler that somebody else had for SIGTERM runs then, too."""
        theirs = signal.getsignal(number) if number == signal.SIGTERM else None

        def stopped() -> None:
            self._stop.set()
            if callable(theirs):
                try:
                    theirs(number, None)
                except BaseException:  # SystemExit is what many of them raise
                    _log.info("what a handler of SIGTERM raises ends nothing here", exc_info=True)

        self._loop.add_signal_handler(number, stopped)

    def _trust(self) -> None:
        if not self._parts.destination.trust():
            self._loop.call_later(1, self._trust)

    async def _reload(self) -> None:
        for callback in self._declarations.reloads:
            result = callback(**self._declarations.values(callback))
            if inspect.isawaitable(result):
                await result

    def _adopt(self, loaded: LoadedInstance) -> None:
        self.handled = {
            name: HandledListener(
                connections,
                self._declarations.values(connections.handler, skip=1),
                self._safe_points,
            )
            for name, connections in self._declarations.connections.items()
        }
        with no_collection():
            for adopted in loaded.adopted:
                if adopted.listener in self.handled:
                    self.handled[adopted.listener].adopt(adopted)

    async def _open(self) -> None:
        """Begin to serve, once all handlers of what was adopted wait for something."""
        limit = self._parts.report.parameters.downtime_limit
        late = await self._safe_points.all_come(limit)
        if late:
            _log.warning(
                "%d handlers of adopted connections have not come to their first wait within"
                " downtime-limit: the others go on without them", late,
            )  # fmt: skip
        arrivals = [each for hosting in self.hostings.values() for each in hosting.take_arrivals()]
        if arrivals:  # in a task: this instance can be asked meanwhile
            parameters = self._parts.report.parameters
            self._replays = replays.Replays(
                arrivals, parameters.replay_timeout, parameters.websocket_spread
            )
            self._replaying = self._loop.create_task(self._replay(self._replays))
        else:
            self._let_in()

    async def _replay(self, beginning: replays.Replays) -> None:
        """Have the handlers of what has no end begin anew, then let everybody in."""
        try:
            replayed = await beginning.run()
        finally:
            self._let_in()
        report = self._parts.report
        message = (
            f"generation {report.generation} goes on with {replayed.moved} connections without an end,"
            f" whose handlers began anew in {replayed.seconds:.3f} s; {replayed.refused} have to dial"
            " again"
        )
        report.tell(Priority.INFO, "destination", "replay", JournalOutcome.DONE, message)

    async def _all_let_in(self, *, last: bool = False) -> None:
        """Wait for the end of that; no handler takes longer than a few seconds. `last`: this instance
        ends."""
        if self._replaying:
            await asyncio.wait([self._replaying])
        if self._replays and last:
            await self._replays.end()

    def _let_in(self) -> None:
        """Let all clients in."""
        self._safe_points.open()
        for handled in self.handled.values():
            handled.open()
        for hosting in self.hostings.values():
            hosting.open()

    def _begin_tasks(self, wanted: Sequence[tuple[Task, dict[str, DeclaredState[Any]]]]) -> None:
        self._tasks = [
            self._loop.create_task(
                task(**{name: declared.value for name, declared in arguments.items()}),
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
            self._parts, self._safe_points, self._stop, self.handled, self.hostings
        )

    async def _settle(self) -> Settled:
        return await self._two_waits.settle()

    def _crosses(self, backend: str) -> bool:
        return self._parts.answering.crosses(backend)

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
        counts = [hosting.in_hand() for hosting in self.hostings.values()]
        messages, connections = (sum(each) for each in zip((0, 0), *counts, strict=True))
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
        self._read_no_more()
        for handled in self.handled.values():
            handled.let_go()
        for hosting in self.hostings.values():
            hosting.let_go()
            # Our states are another instance's by now: no new request may write to them here.
            hosting.finish(replaced=True)
        self._safe_points.open()
        for handled in self.handled.values():
            handled.finish()

    def _read_no_more(self) -> None:
        """What comes for a backend that is no socket is another instance's: no callback of the program
        gets it any more."""
        for backend in self._declarations.backends.values():
            for fd in backend.fds if backend.moved else ():
                with contextlib.suppress(RuntimeError):  # a transport of the program's has it
                    self._loop.remove_reader(fd.fileno())
                    self._loop.remove_writer(fd.fileno())

    def let_go(self) -> None:
        """Close our copies of what has moved."""
        for handled in self.handled.values():
            handled.close_copies()
        for hosting in self.hostings.values():
            hosting.close_copies()
        for bound in self._declarations.sockets.values():
            bound.close()

    async def _drain_rest(self) -> None:
        """What could not move ends after what it is at, by the deadline or `stop`."""
        if self._connections_open():
            self._parts.answering.drain()
        await cancel(self._tasks, self.deadline)
        if self.hostings:
            parameters = self._parts.report.parameters
            begin = time.monotonic() + parameters.websocket_timeout
            goodbyes = hosted_listeners.Goodbyes(begin, parameters.websocket_spread)
            hostings = self.hostings.values()
            await hosted_listeners.end_all(hostings, self.deadline, self._stop, goodbyes)
        for handled in self.handled.values():
            await handled.all_ended(self.deadline, self._stop)

    def _park(self) -> bool:
        # From here to the end of park() no other callback runs: this is the freeze.
        source = self._parts.source
        self._two_waits.tell_noise()
        cut = list(self._parts.turns.running.values())
        source.frozen = source.park(*self._taken(), cut)
        if source.frozen:
            self._read_no_more()
            for handled in self.handled.values():
                handled.let_go()
            for hosting in self.hostings.values():
                hosting.let_go()
                hosting.drop_rest()
        return source.frozen

    def freeze(self) -> tuple[list[save.Frozen], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes. Raises BusyWork."""
        if busy := self._two_waits.busy():
            raise BusyWork(busy)
        self._two_waits.require_quiet()
        return self._taken()

    def _taken(self) -> tuple[list[save.Frozen], list[image.LeftBehind]]:
        frozen: list[save.Frozen] = []
        busy: list[image.LeftBehind] = []
        for name, handled in self.handled.items():
            moving, staying = handled.freeze(crosses=self._crosses(name))
            frozen += moving
            busy += staying
        for hosting in self.hostings.values():
            moving, staying = hosting.freeze()
            frozen += moving
            busy += staying
        return frozen, busy

    async def _drain(self, deadline: float) -> None:
        """End all handlers, with their `finally` blocks, and send what is unsent."""
        self._parts.turns.open()
        handlers = [task for handled in self.handled.values() for task in handled.tasks]
        for handled in self.handled.values():
            handled.close_unheard()
        for hosting in self.hostings.values():
            hosting.finish()
        await cancel([*self._tasks, *handlers], deadline)
        await hosted_listeners.end_all(self.hostings.values(), deadline)
        for handled in self.handled.values():
            await handled.all_sent(deadline)
        for bound in self._declarations.sockets.values():
            if bound.kind is Kind.LISTENER:
                bound.close()
