# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection on an asyncio loop: reads, writes, and its safe points; accepts nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

from upgrader.backends import Waiting
from upgrader.errors import DeclarationError, Retired, UnsavableState
from upgrader.image import LeftBehind
from upgrader.inbox import Frame
from upgrader.outgoing import Frozen
from upgrader.state import encode
from upgrader.stream import HIGH_WATER, Stream, show_peer

S = TypeVar("S")

#: Bytes that a handler may leave unsent while connections are being collected: what it has
#: written moves along, and a client that reads slowly does not hold up the rest.
_STOPPING_WATER = 64 << 20
_log = logging.getLogger("upgrader")


class Home(Protocol):
    """What a peer needs of its instance."""

    loop: asyncio.AbstractEventLoop
    replaced: bool

    async def pass_gate(self) -> None:
        """Wait while connections are being collected at their safe points."""

    def mark(self, peer: Peer[Any], *, busy: bool) -> None:
        """Note whether a peer is at a safe point."""

    def forget(self, peer: Peer[Any]) -> None:
        """Note that a peer is closed."""


class Peer(Generic[S]):
    """One connection, accepted or adopted. Asking for the next message is its safe point."""

    def __init__(self, home: Home, door: str, stream: Stream, state: S, *, adopted: bool) -> None:
        self.state = state
        self.adopted = adopted  #: it came from another instance, and the handler is called anew
        self._home = home
        self._door = door
        self._stream = stream
        # asyncio gets the number: looked up as an object, a new socket is formatted into an error
        # message first, which costs more than all the rest.
        self._fd = stream.sock.fileno()
        self._loop = home.loop
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._reading = False
        self._in_safe = False
        self._moved = False
        self._ending = False
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

    def finish(self) -> None:
        """It does not move: its handler may end what it is at, and gets no further message."""
        self._ending = True
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def open_stream(self) -> tuple[str, Stream]:
        """The backend and what is open, for who describes it."""
        return self._door, self._stream

    @property
    def door(self) -> str:
        """The name of the backend."""
        return self._door

    def resume(self) -> None:
        """The end was called off."""
        self._high_water = HIGH_WATER

    def let_go(self) -> None:
        """It has moved: nothing here touches it any more, but our copy of its FD stays open."""
        self._moved = True
        self._stop_reading()
        self._loop.remove_writer(self._fd)

    def close_copy(self) -> None:
        """Close our copy of an FD that has moved: else its client would not see that the next
        instance closes it."""
        self._stream.sock.close()

    def freeze(self) -> Frozen | LeftBehind | None:
        """What moves; why it stays; or None if it is gone anyway."""
        if self._stream.lost:
            return None
        try:
            moved = self._stream.freeze(encode(self.state))
        except UnsavableState as error:
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
            if message is not None or self._stream.eof or self._home.replaced or self._ending:
                self._mark(None)
                return message
            await self._wait_readable()

    async def _pass_gate(self) -> None:
        if self._ending:
            return
        await self._home.pass_gate()
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
        self._home.mark(self, busy=waiting is None)

    def _forget(self) -> None:
        if self._stream.sock.fileno() >= 0:
            self._stop_reading()
            self._loop.remove_writer(self._fd)
            self._stream.close(shared=self.adopted)
        self._stream.lose()
        self._wake_writer()
        self._home.forget(self)

    def _forbid_in_safe(self) -> None:
        if self._in_safe:
            raise DeclarationError("peer.safe()", "nothing may be read inside: it would be lost")
