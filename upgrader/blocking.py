# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blocking face: `for backend in instance.serve(inbox):`, with migrations between two turns.

Handlers of connections run to their end each time something has come, and never wait.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from upgrader.arrival import Adopted, Arrival
from upgrader.backends import Waiting
from upgrader.declarations import Bound, Connections
from upgrader.errors import DeclarationError, Retired, UnsavableState
from upgrader.image import LeftBehind
from upgrader.inbox import Frame
from upgrader.instance import Instance as BaseInstance
from upgrader.instance import refused_by_check
from upgrader.outgoing import Frozen
from upgrader.process import stop_signals
from upgrader.state import encode
from upgrader.stream import HIGH_WATER, Stream, accept, show_peer
from upgrader.switchover import Event, Source

if TYPE_CHECKING:
    from upgrader.execution import Execution
    from upgrader.live_source import Request

S = TypeVar("S")

_log = logging.getLogger("upgrader")


class Peer(Generic[S]):
    """One connection, accepted or adopted. Its handler is called once at first, and again whenever
    more has come; every return is a safe point."""

    def __init__(
        self, instance: Instance, connections: Connections, stream: Stream, state: S,
        *, adopted: bool,
    ) -> None:  # fmt: skip
        self.state = state
        self.adopted = adopted  #: it came from another instance
        self.connections = connections
        self.stream = stream
        self._instance = instance

    @property
    def address(self) -> str:
        """The other end's address, as people write it."""
        return show_peer(self.stream.sock)

    def messages(self, frame: Frame, limit: int = 65536) -> Iterator[bytes]:
        """The whole messages that are here; an incomplete one stays unread until more comes.

        `frame` is a separator, or a function that gets the buffer and returns the length of the
        first whole message, or None. Raises MessageTooLong above `limit` bytes.
        """
        if self._instance.beginning:  # the other adopted ones have not been called yet
            return
        while (message := self.stream.inbox.take_message(frame, limit)) is not None:
            yield message

    def lines(self, limit: int = 65536) -> Iterator[bytes]:
        """The whole lines that are here, without their end."""
        for line in self.messages(b"\n", limit):
            yield line.rstrip(b"\r\n")

    def write(self, data: bytes) -> None:
        """Queue data and return; the handler is not called again while over 64 KiB are unsent.

        Raises ConnectionResetError when the peer is gone, Retired after a migration.
        """
        if self._instance.frozen:
            raise Retired(self.address)
        self.stream.queue(data)
        if self.stream.unsent:
            self._instance.watch(self)  # it may not be the one whose handler runs

    def close(self) -> None:
        """Close the connection once this call of the handler is over and all is sent."""
        self.stream.waiting = Waiting.CLOSING


class Instance(BaseInstance):
    """An instance whose loop is the `for` loop of the program."""

    def serve(self, *backends: Bound) -> Iterator[Bound]:
        """Load, verify, tell PID 1 READY=1; then yield each of `backends` that has something to
        read, until this instance is stopped.

        Raises UpgradeError if the instance cannot be loaded (the image stays as it was), and
        DeclarationError outside of the main thread, where no signal arrives.
        """
        if threading.current_thread() is not threading.main_thread():
            raise DeclarationError("serve()", "runs in the main thread only")
        self._signal = threading.Event()
        self._peers: dict[int, Peer[Any]] = {}
        self.beginning = False  # adopted connections are handed to their handlers
        wake, waker = socket.socketpair()
        with wake, waker, selectors.DefaultSelector() as self._selector:
            waker.setblocking(False)
            self._selector.register(wake, selectors.EVENT_READ)
            before = self._listen_to_signals(waker)
            self._requests: deque[Request | Execution] = deque()
            self._reloads: deque[Future[None]] = deque()
            self.answer_with(
                lambda request: self._want(request, waker), lambda: self._want_reload(waker)
            )
            try:
                self._load(backends)
                self.answer()
                self._trusted = time.monotonic() + self.parameters.insurance
                yield from self._turns(wake, backends)
                if not self.frozen:
                    self._retire()
            finally:
                signal.set_wakeup_fd(-1)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def connections_open(self) -> Sequence[tuple[str, Stream]]:
        """All open connections with their backend; called from any thread."""
        return [(p.connections.door.name, p.stream) for p in list(self._peers.values())]

    # The beginning

    def _load(self, backends: tuple[Bound, ...]) -> None:
        try:
            arrival = self.load()
            for check in self.declarations.checks:
                try:
                    check(**self.arguments(check))
                except Exception as error:
                    raise refused_by_check(check, error) from error
            self.commit(arrival, lambda: self._begin(arrival, backends))
        except Exception as error:
            self.refuse(error)
            raise

    def _listen_to_signals(self, waker: socket.socket) -> dict[signal.Signals, Any]:
        def stop(number: int, frame: FrameType | None) -> None:
            if not self.committing:  # not the owner yet: nothing to park, and somebody waits
                raise SystemExit(128 + number)
            self._signal.set()

        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        return {n: signal.signal(n, stop) for n in stop_signals(self.supervised)}

    def _begin(self, arrival: Arrival, backends: tuple[Bound, ...]) -> None:
        for backend in backends:
            backend.socket.setblocking(False)
            self._selector.register(backend, selectors.EVENT_READ, backend)
        self._arguments = {
            name: self.arguments(connections.handler, skip=1)
            for name, connections in self.declarations.connections.items()
        }
        self.beginning = True
        for adopted in arrival.adopted:
            self._adopt(adopted)
        self.beginning = False
        for peer in list(self._peers.values()):
            if peer.stream.inbox.buffer:
                self._handle(peer)
        for connections in self.declarations.connections.values():
            door = connections.door
            while door.backlog:
                self._open(connections, door.backlog.popleft())
            self._selector.register(door, selectors.EVENT_READ, connections)

    def _adopt(self, adopted: Adopted) -> None:
        connections = self.declarations.connections[adopted.door]
        stream = Stream(adopted.sock, adopted.state, adopted.identity)
        self._add(Peer(self, connections, stream, adopted.session, adopted=True))

    def _open(self, connections: Connections, sock: socket.socket) -> None:
        state = connections.session() if connections.session else None
        self._add(Peer(self, connections, Stream(sock), state, adopted=False))

    def _add(self, peer: Peer[Any]) -> None:
        self._peers[peer.stream.sock.fileno()] = peer
        self._selector.register(peer.stream.sock, selectors.EVENT_READ, peer)
        self._handle(peer)

    # One turn after the other

    def _turns(self, wake: socket.socket, backends: tuple[Bound, ...]) -> Iterator[Bound]:
        for backend in backends:
            for _ in range(backend.waiting):
                yield backend
        while True:
            left = max(self._trusted - time.monotonic(), 0) if self.insured else None
            for key, events in self._selector.select(left):
                if self._signal.is_set():
                    return
                match key.data:
                    case Bound() as bound:
                        yield bound
                    case Connections() as connections:
                        self._accept(connections)
                    case Peer() as peer:
                        self._serve(peer, events)
                    case _:
                        wake.recv(4096)
                        self._reload()
                        while self._requests:
                            if self._migrate(self._requests.popleft()):
                                return

            if self.insured and time.monotonic() >= self._trusted and not self.trust():
                self._trusted += 1

    def _want_reload(self, waker: socket.socket) -> None:
        """In the control thread: have the callbacks run between two turns, and wait for them."""
        done: Future[None] = Future()
        self._reloads.append(done)
        with contextlib.suppress(OSError):
            waker.send(b"\0")
        done.result()

    def _reload(self) -> None:
        while self._reloads:
            done = self._reloads.popleft()
            try:
                for callback in self.declarations.reloads:
                    callback(**self.arguments(callback))
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _want(self, request: Request | Execution, waker: socket.socket) -> None:
        self._requests.append(request)
        with contextlib.suppress(OSError):
            waker.send(b"\0")

    def _migrate(self, request: Request | Execution) -> bool:
        """Give everything to a live destination, or become it; False if this instance serves on."""
        from upgrader.live_source import Request  # since it answers, it has been loaded

        idle = threading.Event()
        self.turns.close(idle.set)
        if not idle.wait(self.parameters.downtime_limit):
            for name in self.turns.running:
                _log.error("%s did not end its turn within downtime-limit", name)
        if not isinstance(request, Request):
            self.execute(request)
            return False
        giver = self.give(request)
        if giver.state is Source.SERVING:
            return False
        self._flush(self._staying, time.monotonic() + self.parameters.drain_timeout)
        giver.settle()
        if giver.state is Source.RETIRED:
            giver.side.feed(Event.DRAINED)
        return True

    def _resume(self) -> None:
        self.turns.open()

    def _give_up(self) -> None:
        self.frozen = True

    def _let_go(self) -> None:
        for peer in self._peers.values():
            if peer not in self._staying:
                peer.stream.sock.close()
        for bound in self.declarations.sockets.values():
            bound.close()

    def _accept(self, connections: Connections) -> None:
        try:
            sock = accept(connections.door.socket)
        except OSError as error:
            _log.error("%s: cannot accept: %s", connections.door.name, error)
            time.sleep(0.1)  # out of FDs or memory: the backlog holds them meanwhile
            return
        if sock is not None:
            self._open(connections, sock)

    def _serve(self, peer: Peer[Any], events: int) -> None:
        if events & selectors.EVENT_WRITE:
            peer.stream.flush()
        if events & selectors.EVENT_READ:
            peer.stream.receive()
        self._handle(peer)

    def _handle(self, peer: Peer[Any]) -> None:
        """Call the handler unless it must wait, then see what the connection waits for."""
        stream = peer.stream
        door = peer.connections.door.name
        if stream.waiting is not Waiting.CLOSING and len(stream.unsent) <= HIGH_WATER:
            stream.waiting = None
            try:
                peer.connections.handler(peer, **self._arguments[door])
            except ConnectionError as error:
                _log.debug("%s: %s", peer.address, error)
                stream.lose()
            except Exception:
                _log.exception("handler of %s failed", peer.address)
                peer.close()
            if stream.waiting is None:
                stream.waiting = Waiting.CLOSING if stream.eof else Waiting.MESSAGE
        if stream.lost or (stream.waiting is Waiting.CLOSING and not stream.unsent):
            self._forget(peer)
            return
        self.watch(peer)

    def watch(self, peer: Peer[Any]) -> None:
        """See to it that the loop wakes up for what the connection waits for."""
        stream = peer.stream
        if self._peers.get(stream.sock.fileno()) is not peer:
            return
        wanted = selectors.EVENT_WRITE if stream.unsent else 0
        if stream.waiting is Waiting.MESSAGE and len(stream.unsent) <= HIGH_WATER:
            wanted |= selectors.EVENT_READ
        if self._selector.get_key(stream.sock).events != wanted:
            self._selector.modify(stream.sock, wanted, peer)

    def _forget(self, peer: Peer[Any]) -> None:
        del self._peers[peer.stream.sock.fileno()]
        self._selector.unregister(peer.stream.sock)
        peer.stream.close(shared=peer.adopted)

    # The end

    def _retire(self) -> None:
        parks, deadline = self.told_to_stop()
        if not parks:
            self.leave()
        idle = threading.Event()
        self.turns.close(idle.set)
        if not idle.wait(min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX)):
            for name in self.turns.running:
                _log.error("%s did not end its turn within drain-timeout", name)
        if parks:
            frozen, busy = self._freeze()
            self.frozen = self.park(frozen, busy)
        if self.frozen:
            self._flush(self._staying, deadline)
        else:
            self.turns.open()
            self.leave()
            self._flush(list(self._peers.values()), deadline)

    def _freeze(self) -> tuple[list[Frozen], list[LeftBehind]]:
        frozen, busy = [], []
        self._staying: list[Peer[Any]] = []
        for peer in self._peers.values():
            door = peer.connections.door.name
            if peer.stream.lost:
                continue
            moved, why = None, "its handler is busy"
            if self.crosses(door):
                try:
                    moved = peer.stream.freeze(encode(peer.state))
                except UnsavableState as error:
                    why = str(error)
            else:
                why = "backend-transfer=no"
            if moved:
                frozen.append(Frozen(door, peer.stream.sock, peer.stream.identity, moved))
            else:
                busy.append(LeftBehind(door, peer.address, why))
                self._staying.append(peer)
        return frozen, busy

    def _flush(self, peers: Sequence[Peer[Any]], deadline: float) -> None:
        """Send what is unsent until the deadline, and close."""
        for peer in peers:
            while peer.stream.unsent and (left := deadline - time.monotonic()) > 0:
                peer.stream.sock.settimeout(left)
                peer.stream.flush()
            peer.stream.sock.close()

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)
