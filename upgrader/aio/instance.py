# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance on an asyncio loop: accepts, serves, freezes, and resumes or ends.

asyncio is one thread, so a migration inside one callback suspends every task at its await point.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upgrader.aio.adapter import Adapter
from upgrader.aio.handled_listener import HandledListener
from upgrader.aio.hosting import Hosting, end_all
from upgrader.aio.peer import Peer
from upgrader.aio.safe_points import SafePoints
from upgrader.aio.streams import attached
from upgrader.aio.waiting import cancel, next_event
from upgrader.arrival import Arrival
from upgrader.declarations import Listener, Protocols
from upgrader.image import LeftBehind
from upgrader.instance import Ended, refused_by_check
from upgrader.instance import Instance as BaseInstance
from upgrader.outgoing import Frozen
from upgrader.process import no_collection, stop_signals
from upgrader.switchover import Event, Source

if TYPE_CHECKING:
    import ssl

    from upgrader.execution import Execution
    from upgrader.host import Open
    from upgrader.live_source import Request

Task = Callable[..., Coroutine[Any, Any, object]]

_FOR_TURNS = 0.2  # of the time there is to come to a stop
_log = logging.getLogger("upgrader")


class Instance(BaseInstance):
    """An instance on the running asyncio loop."""

    loop: asyncio.AbstractEventLoop
    replaced = False  #: another instance owns all that has moved; what is left here is drained
    #: Of `time.monotonic`: by then a process that was told to end should be gone.
    deadline = float("inf")

    def protocols(
        self, door: Listener, adapter: Adapter, *, tls: ssl.SSLContext | None = None
    ) -> None:
        """Declare that a library owns the connections of a door: uvicorn, aiohttp, one of yours.

        Idle connections move; one that is busy ends in the source, after what it is at. With
        `tls` only the listener moves: the keys of open connections cannot, so all of those are
        ended that way. Raises DeclarationError for a door that somebody handles already.
        """
        self.declarations.add_protocols(Protocols(door, adapter, tls))

    async def serve(self, tasks: Sequence[Task] = ()) -> Ended:
        """Load, verify, tell PID 1 READY=1, and serve until this instance is stopped.

        `tasks` run from then on, and only while this instance is the owner. Raises UpgradeError if
        the instance cannot be loaded (the image stays as it was), and whatever a task raises.
        """
        self.loop = asyncio.get_running_loop()
        self._safe_points = SafePoints()
        self._handled: dict[str, HandledListener] = {}
        self._hostings = {
            name: Hosting(self.loop, declared)
            for name, declared in self.declarations.protocols.items()
        }
        stop = asyncio.Event()
        wanted = [(task, self.declarations.arguments(task)) for task in tasks]
        requests: asyncio.Queue[Request | Execution] = asyncio.Queue()
        self.answer_with(
            lambda request: self.loop.call_soon_threadsafe(requests.put_nowait, request),
            lambda: asyncio.run_coroutine_threadsafe(self._reload(), self.loop).result(),
        )
        try:
            arrival = self.load()
            for name, hosting in self._hostings.items():
                hosting.prepare([item for item in arrival.adopted if item.door == name])
            await self._verify()
            for number in stop_signals(self.supervised):
                self._catch(number, stop)
            self.commit(arrival, lambda: self._adopt(arrival))
        except Exception as error:
            self.refuse(error)
            raise
        await self._open()
        self.answer()
        self.loop.call_later(self.parameters.insurance, self._trust)
        running = [
            self.loop.create_task(
                task(**{name: declared.value for name, declared in arguments.items()}),
                name=getattr(task, "__name__", None),
            )
            for task, arguments in wanted
        ]
        ended = Ended.MIGRATED
        failure: BaseException | None = None
        while True:
            event = await next_event(stop, requests, running)
            if event is None or isinstance(event, BaseException):
                failure = event
                ended = await self._retire(running, failure)
                break
            if await self._migrate(event, running, stop):
                break
        for number in stop_signals(self.supervised):
            self.loop.remove_signal_handler(number)
        if failure and ended is Ended.STOPPED:
            raise failure
        return ended

    @property
    def peers(self) -> Sequence[Peer[Any]]:
        """All open connections."""
        return [peer for handled in self._handled.values() for peer in handled.peers]

    def connections_open(self) -> Sequence[tuple[str, Open]]:
        """All open connections with their backend; called from any thread."""
        open_here: list[tuple[str, Open]] = []
        for name, handled in self._handled.items():
            open_here += [(name, connection.stream) for connection in handled.connections]
        for name, hosting in self._hostings.items():
            open_here += [(name, hosted) for hosted in hosting.connections if not hosted.gone]
        return open_here

    # The beginning

    async def _verify(self) -> None:
        for check in self.declarations.checks:
            try:
                result = check(**self.arguments(check))
                if inspect.isawaitable(result):
                    await result
            except Exception as error:
                raise refused_by_check(check, error) from error

    def _catch(self, number: signal.Signals, stop: asyncio.Event) -> None:
        """End at a signal; a handler that somebody else had for SIGTERM runs then, too."""
        theirs = signal.getsignal(number) if number is signal.SIGTERM else None

        def stopped() -> None:
            stop.set()
            if callable(theirs):
                try:
                    theirs(number, None)
                except BaseException:  # SystemExit is what many of them raise
                    _log.info("what a handler of SIGTERM raises ends nothing here", exc_info=True)

        self.loop.add_signal_handler(number, stopped)

    def _trust(self) -> None:
        if not self.trust():
            self.loop.call_later(1, self._trust)

    async def _reload(self) -> None:
        for callback in self.declarations.reloads:
            result = callback(**self.arguments(callback))
            if inspect.isawaitable(result):
                await result

    def _adopt(self, arrival: Arrival) -> None:
        self._handled = {
            name: HandledListener(
                connections, self.arguments(connections.handler, skip=1), self._safe_points
            )
            for name, connections in self.declarations.connections.items()
        }
        with no_collection():
            for adopted in arrival.adopted:
                if adopted.door in self._handled:
                    self._handled[adopted.door].adopt(adopted)

    async def _open(self) -> None:
        """Begin to serve, once all handlers of what was adopted wait for something."""
        late = await self._safe_points.all_come(self.parameters.downtime_limit)
        if late:
            _log.warning(
                "%d handlers of adopted connections have not come to their first wait within"
                " downtime-limit: the others go on without them", late,
            )  # fmt: skip
        self._safe_points.open()
        for handled in self._handled.values():
            handled.open()
        for hosting in self._hostings.values():
            hosting.open()

    # The end

    async def _retire(
        self, tasks: list[asyncio.Task[object]], failure: BaseException | None
    ) -> Ended:
        parks, deadline = self.told_to_stop(failed=failure is not None)
        self.deadline = deadline
        self._hold(for_good=True)
        if not parks:
            self.leave()
        await self._come_to_a_stop(deadline, for_good=True)
        if parks and self._park():
            self.exit_status = 1 if failure else 0
            await cancel(tasks, deadline)
            return Ended.MIGRATED
        self.leave()
        await self._drain(tasks, deadline)
        return Ended.STOPPED

    def _hold(self, *, for_good: bool) -> None:
        """Accept no more, and let no connection leave its safe point."""
        self._safe_points.close()
        for handled in self._handled.values():
            handled.hold()
        for name, hosting in self._hostings.items():
            hosting.hold(for_good=for_good, crosses=self.crosses(name))

    def _resume(self) -> None:
        """As if nothing had happened."""
        self.turns.open()
        self._safe_points.open()
        for handled in self._handled.values():
            handled.resume()
        for hosting in self._hostings.values():
            hosting.resume()

    async def _execute(self, execution: Execution) -> None:
        """Become the new version; returns only if that fails, and this instance serves on."""
        self._hold(for_good=False)
        # Nobody could drain afterwards.
        deadline = time.monotonic() + self.parameters.drain_timeout
        await self._come_to_a_stop(deadline, for_good=False)
        self.execute(execution)

    async def _migrate(
        self,
        request: Request | Execution,
        tasks: list[asyncio.Task[object]],
        stop: asyncio.Event,
    ) -> bool:
        """Give everything to a live destination; False if this instance serves on."""
        from upgrader.live_source import Request  # since it answers, it has been loaded

        if not isinstance(request, Request):
            await self._execute(request)
            return False
        self._hold(for_good=False)
        limit = time.monotonic() + self.parameters.downtime_limit
        await self._collect(limit, drained=True)
        giver = self.give(request)  # nothing else runs meanwhile: the freeze
        if giver.state is Source.SERVING:
            return False
        self.deadline = time.monotonic() + self.parameters.drain_timeout
        draining = self.loop.create_task(self._drain_rest(tasks, stop))
        while giver.state is Source.COMMITTED:
            giver.side.feed(await asyncio.wrap_future(giver.told))
        if giver.state is Source.PARKED:  # Restart= brings all back, once this process is gone
            draining.cancel()
            return True
        await draining
        giver.side.feed(Event.STOP if stop.is_set() else Event.DRAINED)
        return True

    def _give_up(self) -> None:
        self.replaced = True
        for handled in self._handled.values():
            handled.let_go()
        for hosting in self._hostings.values():
            hosting.let_go()
            # Our states are another instance's by now: no new request may write to them here.
            hosting.finish(one_more=not self.declarations.states)
        self._safe_points.open()
        for handled in self._handled.values():
            handled.finish()

    def _let_go(self) -> None:
        for handled in self._handled.values():
            handled.close_copies()
        for hosting in self._hostings.values():
            hosting.close_copies()
        for bound in self.declarations.sockets.values():
            bound.close()

    async def _drain_rest(self, tasks: list[asyncio.Task[object]], stop: asyncio.Event) -> None:
        """What could not move ends after what it is at, by the deadline or `stop`."""
        if self.connections_open():
            self.drains()
        await cancel(tasks, self.deadline)
        await end_all(self._hostings.values(), self.deadline, stop)
        for handled in self._handled.values():
            await handled.all_ended(self.deadline, stop)

    async def _come_to_a_stop(self, deadline: float, *, for_good: bool) -> None:
        """Connections that do not move end while this instance still owns, the others come to
        their safe points, both until the deadline."""
        staying = [h for name, h in self._handled.items() if not self.crosses(name)]
        for handled in staying:
            handled.finish()
        await self._collect(deadline, for_good=for_good)
        for handled in staying:
            await handled.all_ended(deadline)

    async def _collect(
        self, deadline: float, *, for_good: bool = False, drained: bool = False
    ) -> None:
        """Wait until all that moves is at safe points and no turn runs, or for the deadline.
        `drained`: what is not, may end here afterwards."""
        moving = [
            connection
            for name, handled in self._handled.items()
            if self.crosses(name)
            for connection in handled.connections
        ]
        # No grace here: PID 1 kills at the end of TimeoutStopSec=, and parking comes first.
        await self._safe_points.all_safe(moving, _before_turns(deadline))
        settled = _before_turns(deadline)
        for hosting in self._hostings.values():
            await hosting.settle(settled, for_good=for_good, drained=drained)
        # However long a handler is busy, no turn may begin from here on, or be cut in two.
        idle = asyncio.Event()
        self.turns.close(lambda: self.loop.call_soon_threadsafe(idle.set))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                await idle.wait()
                return
        for name in self.turns.running:
            limit = "downtime-limit" if drained else "drain-timeout"
            _log.error("%s did not end its turn within %s", name, limit)

    def _park(self) -> bool:
        # From here to the end of park() no other callback runs: this is the freeze.
        self.frozen = self.park(*self._freeze())
        if self.frozen:
            for handled in self._handled.values():
                handled.let_go()
            for hosting in self._hostings.values():
                hosting.let_go()
        return self.frozen

    def _freeze(self) -> tuple[list[Frozen], list[LeftBehind]]:
        frozen: list[Frozen] = []
        busy: list[LeftBehind] = []
        for name, handled in self._handled.items():
            moving, staying = handled.freeze(crosses=self.crosses(name))
            frozen += moving
            busy += staying
        for hosting in self._hostings.values():
            moving, staying = hosting.freeze()
            frozen += moving
            busy += staying
        return frozen, busy

    async def _drain(self, tasks: list[asyncio.Task[object]], deadline: float) -> None:
        """End all handlers, with their `finally` blocks, and send what is unsent."""
        self.turns.open()
        handlers = [task for handled in self._handled.values() for task in handled.tasks]
        for hosting in self._hostings.values():
            hosting.finish()
        await cancel([*tasks, *handlers], deadline)
        await end_all(self._hostings.values(), deadline)
        for handled in self._handled.values():
            await handled.all_sent(deadline)
        for bound in self.declarations.sockets.values():
            if isinstance(bound, Listener):
                bound.close()

    async def __aenter__(self) -> Instance:
        attached.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)


def _before_turns(deadline: float) -> float:
    """What is left until a deadline (of `time.monotonic`), but for a part in which turns end."""
    now = time.monotonic()
    return now + max(deadline - now, 0) * (1 - _FOR_TURNS)
