# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance on an asyncio loop: accepts, serves, freezes, and resumes or ends.

asyncio is one thread, so a migration inside one callback suspends every task at its await point.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upgrader.aio.peer import Peer
from upgrader.backends import Waiting
from upgrader.declarations import Connections, Listener
from upgrader.image import LeftBehind
from upgrader.incoming import Adopted, Arrival
from upgrader.instance import Ended, no_collection, refused_by_check, stop_signals
from upgrader.instance import Instance as BaseInstance
from upgrader.outgoing import Frozen
from upgrader.stream import Stream, accept
from upgrader.switchover import Source

if TYPE_CHECKING:
    from upgrader.live import Request

Task = Callable[..., Coroutine[Any, Any, object]]

_ACCEPTS = 128  # connections accepted in one go, so that one door does not starve the others
_FOR_TURNS = 0.2  # of the time there is to come to a stop
_GRACE = 1.0  # seconds for what has to end although the deadline has passed
_log = logging.getLogger("upgrader")


class Instance(BaseInstance):
    """An instance on the running asyncio loop."""

    loop: asyncio.AbstractEventLoop
    replaced = False  #: another instance owns all that has moved; what is left here is drained

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
        stop = asyncio.Event()
        wanted = [(task, self.declarations.arguments(task)) for task in tasks]
        try:
            arrival = self.load()
            await self._verify()
            for number in stop_signals(self.supervised):
                self.loop.add_signal_handler(number, stop.set)
            self.commit(arrival)
        except Exception as error:
            self.refuse(error)
            raise
        self._begin(arrival)
        requests: asyncio.Queue[Request] = asyncio.Queue()
        self.answer(
            lambda request: self.loop.call_soon_threadsafe(requests.put_nowait, request),
            lambda: asyncio.run_coroutine_threadsafe(self._reload(), self.loop).result(),
        )
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
            event = await _next_event(stop, requests, running)
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

    def connections_open(self) -> Sequence[tuple[str, Stream]]:
        """All open connections with their backend; called from any thread."""
        return [peer.open_stream() for peer in list(self._peers)]

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
        with no_collection():
            for adopted in arrival.adopted:
                self._adopt(adopted)
        for connections, _ in self._handlers.values():
            door = connections.door
            while door.backlog:
                self._open(connections, door.backlog.popleft())
            self.loop.add_reader(door.socket, self._on_acceptable, connections)

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

    def _on_acceptable(self, connections: Connections) -> None:
        if self.frozen or self.replaced:
            return
        for _ in range(_ACCEPTS):
            try:
                sock = accept(connections.door.socket)
            except OSError as error:  # out of FDs or memory: leave them in the backlog for a while
                _log.error("%s: cannot accept: %s", connections.door.name, error)
                self.loop.remove_reader(connections.door.socket)
                self.loop.call_later(1, self._accept_again, connections)
                return
            if sock is None:
                return
            self._open(connections, sock)

    def _accept_again(self, connections: Connections) -> None:
        if self._gate.is_set():
            self.loop.add_reader(connections.door.socket, self._on_acceptable, connections)

    # The end

    async def _retire(
        self, tasks: list[asyncio.Task[object]], failure: BaseException | None
    ) -> Ended:
        parks, deadline = self.told_to_stop(failed=failure is not None)
        self._hold()
        if not parks:
            self.leave()
        staying = self._finish_those_that_stay()
        await self._collect(deadline, [peer for peer in self._peers if peer not in staying])
        while staying & self._peers.keys() and (left := deadline - time.monotonic()) > 0:
            self._quiet.clear()
            await _first(left, self._quiet)
        if parks and self._park():
            self.exit_status = 1 if failure else 0
            await _cancel(tasks, deadline)
            return Ended.MIGRATED
        self.leave()
        await self._drain(tasks, deadline)
        return Ended.STOPPED

    def _hold(self) -> None:
        """Accept no more, and let no connection leave its safe point."""
        self._gate.clear()
        for peer in self._peers:
            peer.stopping()
        for connections, _ in self._handlers.values():
            self.loop.remove_reader(connections.door.socket)

    def _resume(self) -> None:
        """As if nothing had happened."""
        self.turns.open()
        for peer in self._peers:
            peer.resume()
        self._gate.set()
        for connections, _ in self._handlers.values():
            self.loop.add_reader(connections.door.socket, self._on_acceptable, connections)

    async def _migrate(
        self, request: Request, tasks: list[asyncio.Task[object]], stop: asyncio.Event
    ) -> bool:
        """Give everything to a live destination; False if this instance serves on."""
        self._hold()
        moving = [peer for peer in self._peers if self.crosses(peer.door)]
        await self._collect(time.monotonic() + self.parameters.downtime_limit, moving)
        stands = self.give(request, self._freeze)  # nothing else runs meanwhile: the freeze
        if stands is Source.SERVING:
            self._resume()
            return False
        if stands is Source.PARKED:  # Restart= brings everything back, once this process is gone
            self.frozen = True
            return True
        deadline = time.monotonic() + self.parameters.drain_timeout
        self.replaced = True
        for peer in self._moving:
            peer.let_go(close=True)
            self.forget(peer)
        for bound in self.declarations.sockets.values():
            bound.close()
        self._gate.set()
        for peer in self._peers:
            peer.finish()
        if self._peers:
            self.drains()
        await _cancel(tasks, deadline)
        while self._peers and not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            self._quiet.clear()
            await _first(left, self._quiet, stop)
        self.frozen = True
        return True

    def _finish_those_that_stay(self) -> set[Peer[Any]]:
        """Connections that do not move with a parked image end while this instance still owns."""
        staying = {peer for peer in self._peers if not self.crosses(peer.door)}
        for peer in staying:
            peer.finish()
        return staying

    async def _collect(self, deadline: float, peers: Sequence[Peer[Any]]) -> None:
        """Wait until these connections are at safe points and no turn runs, or for the deadline."""
        # No grace here: PID 1 kills at the end of TimeoutStopSec=, and parking comes first.
        left = max(deadline - time.monotonic(), 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left * (1 - _FOR_TURNS)):
                while not self._busy.isdisjoint(peers):
                    self._quiet.clear()
                    await self._quiet.wait()
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
                peer.let_go(close=False)  # the process ends now
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
        return frozen, busy

    async def _drain(self, tasks: list[asyncio.Task[object]], deadline: float) -> None:
        """End all handlers, with their `finally` blocks, and send what is unsent."""
        self.turns.open()
        handlers = [task for task in self._peers.values() if task]
        await _cancel([*tasks, *handlers], deadline)
        with contextlib.suppress(TimeoutError):
            async with _until_deadline(deadline):
                while any(peer.unsent for peer in self._peers):
                    self._quiet.clear()
                    await self._quiet.wait()
        for door in self.declarations.sockets.values():
            if isinstance(door, Listener):
                door.close()

    async def __aenter__(self) -> Instance:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)


async def _next_event(
    stop: asyncio.Event, requests: asyncio.Queue[Request], tasks: list[asyncio.Task[object]]
) -> Request | BaseException | None:
    """Wait for a migration that is wanted, for what a task raised, or to be told to stop (None)."""
    stopped = asyncio.ensure_future(stop.wait())
    wanted = asyncio.ensure_future(requests.get())
    pending: set[asyncio.Task[Any]] = {stopped, wanted, *(t for t in tasks if not t.done())}
    try:
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if stopped in done:
                return None
            for task in done - {wanted}:
                if not task.cancelled() and (error := task.exception()):
                    _log.error("task %s failed", task.get_name(), exc_info=error)
                    return error
            if wanted in done:
                return wanted.result()
    finally:
        stopped.cancel()
        wanted.cancel()


async def _first(timeout: float, *events: asyncio.Event) -> None:
    """Wait for one of several events, or for the time-out."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _until_deadline(deadline: float) -> asyncio.Timeout:
    """A timeout at a deadline of `time.monotonic`, but in a second at the earliest."""
    return asyncio.timeout(max(deadline - time.monotonic(), _GRACE))


async def _cancel(tasks: Sequence[asyncio.Task[Any]], deadline: float) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        timeout = max(deadline - time.monotonic(), _GRACE)
        _, pending = await asyncio.wait(tasks, timeout=timeout)
        for task in pending:
            _log.error("task %s did not end when cancelled", task.get_name())
