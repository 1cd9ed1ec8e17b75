# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio face: an instance that freezes its handlers instead of cancelling them.

asyncio is one thread, so a migration inside one callback suspends every task at its await point.
Frozen handlers are neither resumed nor cancelled: the process ends without running them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from upgrader.backends import Waiting
from upgrader.declarations import Connections, Listener
from upgrader.errors import DeclarationError, Retired, UnreadableState
from upgrader.image import LeftBehind
from upgrader.inbox import Frame
from upgrader.incoming import Adopted, Arrival
from upgrader.instance import Ended, no_collection, refused_by_check, stop_signals
from upgrader.instance import Instance as BaseInstance
from upgrader.outgoing import Frozen
from upgrader.state import encode
from upgrader.stream import HIGH_WATER, Stream, accept, show_peer
from upgrader.switchover import Source

if TYPE_CHECKING:
    from upgrader.live import Request

S = TypeVar("S")
Task = Callable[..., Coroutine[Any, Any, object]]

_ACCEPTS = 128  # connections accepted in one go, so that one door does not starve the others
_GRACE = 1.0  # seconds for what has to end although the deadline has passed
#: Bytes that a handler may leave unsent while connections are being collected: what it has
#: written moves along, and a client that reads slowly does not hold up the rest.
_STOPPING_WATER = 64 << 20
_log = logging.getLogger("upgrader")


class Peer(Generic[S]):
    """One connection, accepted or adopted. Asking for the next message is its safe point."""

    def __init__(
        self, instance: Instance, door: str, stream: Stream, state: S, *, adopted: bool
    ) -> None:
        self.state = state
        self.adopted = adopted  #: it came from another instance, and the handler is called anew
        self._instance = instance
        self._door = door
        self._stream = stream
        # asyncio gets the number: looked up as an object, a new socket is formatted into an error
        # message first, which costs more than all the rest.
        self._fd = stream.sock.fileno()
        self._loop = instance.loop
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._reading = False
        self._in_safe = False
        self._moved = False
        self._high_water = HIGH_WATER
        self._mark(stream.waiting if stream.waiting is Waiting.CLOSING else None)

    @property
    def address(self) -> str:
        """The other end's address, as people write it."""
        return show_peer(self._stream.sock)

    async def messages(self, frame: Frame, limit: int = 65536) -> AsyncIterator[bytes]:
        """Whole messages until the peer closes. An incomplete one stays unread, and moves along.

        `frame` is a separator, or a function that gets the buffer and returns the length of the
        first whole message, or None. Raises MessageTooLong above `limit` bytes.
        """
        while (message := await self._message(frame, limit)) is not None:
            yield message

    async def lines(self, limit: int = 65536) -> AsyncIterator[bytes]:
        """Lines without their end, until the peer closes."""
        async for line in self.messages(b"\n", limit):
            yield line.rstrip(b"\r\n")

    async def read(self, size: int) -> bytes:
        """Up to `size` more bytes of the message in hand (not a safe point); b"" at the end."""
        self._forbid_in_safe()
        while not self._stream.inbox.buffer and not self._stream.eof:
            await self._wait_readable()
        return self._stream.inbox.take(size)

    async def readexactly(self, size: int) -> bytes:
        """Exactly `size` more bytes of the message in hand; raises asyncio.IncompleteReadError."""
        self._forbid_in_safe()
        while len(self._stream.inbox.buffer) < size:
            if self._stream.eof:
                raise asyncio.IncompleteReadError(self._stream.inbox.take(size), size)
            await self._wait_readable()
        return self._stream.inbox.take(size)

    async def write(self, data: bytes) -> None:
        """Queue data at once; wait only while more than 64 KiB are unsent (64 MiB at the end).

        Raises ConnectionResetError when the peer is gone, Retired after a migration.
        """
        if self._moved:
            raise Retired(self._door)
        self._stream.queue(data)
        if self._stream.unsent:
            self._loop.add_writer(self._fd, self._on_writable)
        while len(self._stream.unsent) > self._high_water:
            if self._writable is None or self._writable.done():
                self._writable = self._loop.create_future()
            await asyncio.shield(self._writable)  # other handlers may wait for it, too

    @contextlib.asynccontextmanager
    async def safe(self) -> AsyncIterator[None]:
        """Waits inside are safe points too: `state` must say where the connection stands.

        Nothing may be taken inside (no read, no queue item): it would be lost with this handler.
        """
        self._in_safe = True
        self._mark(Waiting.SAFE)
        try:
            yield
            await self._pass_gate()
        finally:
            self._in_safe = False
            self._mark(None)

    def close(self) -> None:
        """Close the connection, after what is unsent has gone out."""
        if self._stream.unsent and not self._stream.lost:
            self._stream.eof = True
            self._mark(Waiting.CLOSING)
            self._loop.add_writer(self._fd, self._on_writable)
            return
        self._forget()

    # For the instance

    async def run(self, handler: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Run the handler to its end, then close."""
        try:
            await handler(self, **arguments)
        except (ConnectionError, Retired) as error:
            _log.debug("%s: %s", self.address, error)
        except Exception:
            _log.exception("handler of %s failed", self.address)
        finally:
            if not self._moved:
                self.close()

    def flush(self) -> None:
        """Go on sending what the instance before left unsent."""
        self._loop.add_writer(self._fd, self._on_writable)

    def stopping(self) -> None:
        """Let the handler write all that it has, so that it comes to a safe point."""
        self._high_water = _STOPPING_WATER
        self._wake_writer()

    def resume(self) -> None:
        """The end was called off."""
        self._high_water = HIGH_WATER

    def let_go(self, *, close: bool) -> None:
        """It has moved: nothing here touches it any more. `close` our copy of its FD, too: else
        its client would not see that the next instance closes it."""
        self._moved = True
        if close:
            self._stop_reading()
            self._loop.remove_writer(self._fd)
            self._stream.sock.close()

    def freeze(self) -> Frozen | LeftBehind | None:
        """What moves; why it stays; or None if it is gone anyway."""
        if self._stream.lost:
            return None
        try:
            moved = self._stream.freeze(encode(self.state))
        except UnreadableState as error:
            return LeftBehind(self._door, self.address, str(error))
        if moved is None:
            return LeftBehind(self._door, self.address, "its handler is busy")
        return Frozen(self._door, self._stream.sock, self._stream.identity, moved)

    @property
    def unsent(self) -> int:
        """Bytes written and not sent."""
        return len(self._stream.unsent)

    # Inside

    async def _message(self, frame: Frame, limit: int) -> bytes | None:
        self._forbid_in_safe()
        self._mark(Waiting.MESSAGE)
        while True:
            await self._pass_gate()
            message = self._stream.inbox.take_message(frame, limit)
            if message is not None or self._stream.eof or self._instance.replaced:
                self._mark(None)
                return message
            await self._wait_readable()

    async def _pass_gate(self) -> None:
        await self._instance.pass_gate()
        if self._moved:  # frozen: this handler goes on in another process
            await self._loop.create_future()

    async def _wait_readable(self) -> None:
        if self._stream.eof:
            return
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._on_readable)
        self._readable = self._loop.create_future()
        try:
            await self._readable
        finally:
            self._readable = None

    def _on_readable(self) -> None:
        if self._moved:
            return  # the bytes belong to the next instance
        self._stream.receive()
        if self._stream.eof or (self._readable is None and self._crowded()):
            self._stop_reading()
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def _on_writable(self) -> None:
        if self._moved:
            return
        self._stream.flush()
        if not self._stream.unsent:
            self._loop.remove_writer(self._fd)
            if self._stream.waiting is Waiting.CLOSING:
                self._forget()
        if len(self._stream.unsent) <= HIGH_WATER:
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writable and not self._writable.done():
            self._writable.set_result(None)

    def _crowded(self) -> bool:
        return len(self._stream.inbox.buffer) >= HIGH_WATER

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _mark(self, waiting: Waiting | None) -> None:
        self._stream.waiting = waiting
        self._instance.mark(self, busy=waiting is None)

    def _forget(self) -> None:
        if self._stream.sock.fileno() >= 0:
            self._stop_reading()
            self._loop.remove_writer(self._fd)
            self._stream.sock.close()
        self._stream.lose()
        self._wake_writer()
        self._instance.forget(self)

    def _forbid_in_safe(self) -> None:
        if self._in_safe:
            raise DeclarationError("peer.safe()", "nothing may be read inside: it would be lost")


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
        self.loop.call_later(self.parameters.insurance, self.trust)
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
            if await self._migrate(event, running):
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
        if not self._busy:
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
        await self._collect(deadline)
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

    async def _migrate(self, request: Request, tasks: list[asyncio.Task[object]]) -> bool:
        """Give everything to a live destination; False if this instance serves on."""
        self._hold()
        await self._collect(time.monotonic() + self.parameters.downtime_limit)
        stands = self.give(request, self._freeze)  # nothing else runs meanwhile: the freeze
        if stands is Source.SERVING:
            self._resume()
            return False
        deadline = time.monotonic() + self.parameters.drain_timeout
        self.replaced = True
        for peer in self._moving:
            peer.let_go(close=True)
            self.forget(peer)
        for bound in self.declarations.sockets.values():
            bound.close()
        self._gate.set()  # for those held back: they end what they are at
        await _cancel(tasks, deadline)
        with contextlib.suppress(TimeoutError):
            async with _until_deadline(deadline):
                while self._peers:
                    self._quiet.clear()
                    await self._quiet.wait()
        self.frozen = True
        return True

    async def _collect(self, deadline: float) -> None:
        """Wait until every connection is at a safe point and no turn runs, or for the deadline."""
        idle = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            # No grace here: PID 1 kills at the end of TimeoutStopSec=, and parking comes first.
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                while self._busy:
                    self._quiet.clear()
                    await self._quiet.wait()
                self.turns.close(lambda: self.loop.call_soon_threadsafe(idle.set))
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
