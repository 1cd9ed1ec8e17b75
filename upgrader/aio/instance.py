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
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upgrader.aio.adapter import Adapter
from upgrader.aio.door import Door
from upgrader.aio.hosting import Hosting, end_all
from upgrader.aio.peer import Peer
from upgrader.aio.streams import attached
from upgrader.aio.waiting import cancel, first, next_event, until_deadline
from upgrader.arrival import Adopted, Arrival
from upgrader.backends import Waiting
from upgrader.declarations import Connections, Listener, Protocols
from upgrader.image import LeftBehind
from upgrader.instance import Ended, refused_by_check
from upgrader.instance import Instance as BaseInstance
from upgrader.outgoing import Frozen
from upgrader.process import no_collection, stop_signals
from upgrader.stream import Stream
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
        self._gate = asyncio.Event()
        self._gate.set()
        self._quiet = asyncio.Event()
        self._peers: dict[Peer[Any], asyncio.Task[None] | None] = {}
        self._busy: set[Peer[Any]] = set()
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
            self.commit(arrival, lambda: self._begin(arrival))
        except Exception as error:
            self.refuse(error)
            raise
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
        return list(self._peers)

    def connections_open(self) -> Sequence[tuple[str, Open]]:
        """All open connections with their backend; called from any thread."""
        open_here: list[tuple[str, Open]] = [peer.open_stream() for peer in list(self._peers)]
        for name, hosting in self._hostings.items():
            open_here += [(name, hosted) for hosted in hosting.connections if not hosted.gone]
        return open_here

    # For peers

    async def pass_gate(self) -> None:
        """Wait while connections are being collected at their safe points."""
        await self._gate.wait()

    def mark(self, peer: Peer[Any], *, busy: bool) -> None:
        """Note whether a peer is at a safe point."""
        if busy:
            self._busy.add(peer)
            return
        self._busy.discard(peer)
        self._quiet.set()

    def forget(self, peer: Peer[Any]) -> None:
        """Note that a peer is closed."""
        self._peers.pop(peer, None)
        self.mark(peer, busy=False)

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

    def _begin(self, arrival: Arrival) -> None:
        self._handlers = {
            name: (connections, self.arguments(connections.handler, skip=1))
            for name, connections in self.declarations.connections.items()
        }
        self._doors = [
            Door(self.loop, connections.door, functools.partial(self._open, connections))
            for connections, _ in self._handlers.values()
        ]
        with no_collection():
            for adopted in arrival.adopted:
                if adopted.door in self._handlers:
                    self._adopt(adopted)
        for door in self._doors:
            door.open()
        for hosting in self._hostings.values():
            hosting.open()

    def _adopt(self, adopted: Adopted) -> None:
        stream = Stream(adopted.sock, adopted.state, adopted.identity)
        peer = Peer(self, adopted.door, stream, adopted.session, adopted=True)
        if stream.unsent:
            peer.flush()
        if adopted.state.waiting is Waiting.CLOSING:
            self._peers[peer] = None  # its handler was done, only unsent bytes are left
        else:
            self._start(peer, adopted.door)

    def _open(self, connections: Connections, sock: socket.socket) -> None:
        state = connections.session() if connections.session else None
        peer = Peer(self, connections.door.name, Stream(sock), state, adopted=False)
        self._start(peer, connections.door.name)

    def _start(self, peer: Peer[Any], door: str) -> None:
        connections, arguments = self._handlers[door]
        self._peers[peer] = self.loop.create_task(peer.run(connections.handler, arguments))

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
        self._gate.clear()
        for peer in self._peers:
            peer.stopping()
        for door in self._doors:
            door.close()
        for name, hosting in self._hostings.items():
            hosting.hold(for_good=for_good, crosses=self.crosses(name))

    def _resume(self) -> None:
        """As if nothing had happened."""
        self.turns.open()
        for peer in self._peers:
            peer.resume()
        self._gate.set()
        for door in self._doors:
            door.open()
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
        moving = [peer for peer in self._peers if self.crosses(peer.door)]
        limit = time.monotonic() + self.parameters.downtime_limit
        await self._collect(limit, moving, drained=True)
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
        for peer in self._moving:
            peer.let_go()
            self.forget(peer)
        for hosting in self._hostings.values():
            hosting.let_go()
            # Our states are another instance's by now: no new request may write to them here.
            hosting.finish(one_more=not self.declarations.states)
        self._gate.set()
        for peer in self._peers:
            peer.finish()

    def _let_go(self) -> None:
        for peer in self._moving:
            peer.close_copy()
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
        while self._peers and not stop.is_set() and (left := self.deadline - time.monotonic()) > 0:
            self._quiet.clear()
            await first(left, self._quiet, stop)

    async def _come_to_a_stop(self, deadline: float, *, for_good: bool) -> None:
        """Connections that do not move end while this instance still owns, the others come to
        their safe points, both until the deadline."""
        staying = {peer for peer in self._peers if not self.crosses(peer.door)}
        for peer in staying:
            peer.finish()
        moving = [peer for peer in self._peers if peer not in staying]
        await self._collect(deadline, moving, for_good=for_good)
        while staying & self._peers.keys() and (left := deadline - time.monotonic()) > 0:
            self._quiet.clear()
            await first(left, self._quiet)

    async def _collect(
        self,
        deadline: float,
        peers: Sequence[Peer[Any]],
        *,
        for_good: bool = False,
        drained: bool = False,
    ) -> None:
        """Wait until these connections are at safe points and no turn runs, or for the deadline.
        `drained`: what is not, may end here afterwards."""
        # No grace here: PID 1 kills at the end of TimeoutStopSec=, and parking comes first.
        left = max(deadline - time.monotonic(), 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left * (1 - _FOR_TURNS)):
                while not self._busy.isdisjoint(peers):
                    self._quiet.clear()
                    await self._quiet.wait()
        settled = time.monotonic() + max(deadline - time.monotonic(), 0) * (1 - _FOR_TURNS)
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
            _log.error("%s did not end its turn within drain-timeout", name)

    def _park(self) -> bool:
        # From here to the end of park() no other callback runs: this is the freeze.
        self.frozen = self.park(*self._freeze())
        if self.frozen:
            for peer in self._peers:
                peer.let_go()
            for hosting in self._hostings.values():
                hosting.let_go()
        return self.frozen

    def _freeze(self) -> tuple[list[Frozen], list[LeftBehind]]:
        frozen: list[Frozen] = []
        busy: list[LeftBehind] = []
        self._moving = []
        for peer in self._peers:
            if not self.crosses(peer.door):
                busy.append(LeftBehind(peer.door, peer.address, "backend-transfer=no"))
                continue
            match peer.freeze():
                case Frozen() as item:
                    frozen.append(item)
                    self._moving.append(peer)
                case LeftBehind() as item:
                    busy.append(item)
        for hosting in self._hostings.values():
            moving, staying = hosting.freeze()
            frozen += moving
            busy += staying
        return frozen, busy

    async def _drain(self, tasks: list[asyncio.Task[object]], deadline: float) -> None:
        """End all handlers, with their `finally` blocks, and send what is unsent."""
        self.turns.open()
        handlers = [task for task in self._peers.values() if task]
        for hosting in self._hostings.values():
            hosting.finish()
        await cancel([*tasks, *handlers], deadline)
        await end_all(self._hostings.values(), deadline)
        with contextlib.suppress(TimeoutError):
            async with until_deadline(deadline):
                while any(peer.unsent for peer in self._peers):
                    self._quiet.clear()
                    await self._quiet.wait()
        for door in self.declarations.sockets.values():
            if isinstance(door, Listener):
                door.close()

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
