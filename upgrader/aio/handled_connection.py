# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection with a handler on an asyncio loop: read, written, frozen, and let go or ended.

What its author sees of it is a `Peer`; accepting and adopting it is `handled_listener`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from upgrader.aio.safe_points import SafePoints
from upgrader.errors import DeclarationError, Retired
from upgrader.instance.connection import HIGH_WATER, ConnectionStream
from upgrader.instance.handled import Handled
from upgrader.instance.inbox import Frame
from upgrader.instance.turns import begins_handler
from upgrader.protocol.kinds import Waiting

#: Bytes that a handler may leave unsent while connections are being collected: what it has
#: written moves along, and a client that reads slowly does not hold up the rest.
_STOPPING_WATER = 64 << 20
_HANDSHAKE = 60.0  # seconds; asyncio has the same
_log = logging.getLogger("upgrader")


class HandledConnection(Handled):
    """A connection between its handler and its socket."""

    def __init__(
        self,
        listener: str,
        stream: ConnectionStream,
        session: Any,
        safe_points: SafePoints,
        on_end: Callable[[HandledConnection], object],
        *,
        adopted: bool,
    ) -> None:
        """`session`: the state that goes with it; `on_end` is called once it is closed."""
        super().__init__(listener, stream, session, adopted=adopted)
        self._safe_points = safe_points
        self._on_end = on_end
        # asyncio gets the number: looked up as an object, a new socket is formatted into an error
        # message first, which costs more than all the rest.
        self._fd = stream.sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._reading = False
        self._in_safe = False
        #: Its handler is called anew, and has not waited for anything yet.
        self._coming = adopted and stream.waiting is not Waiting.CLOSING
        if self._coming:
            safe_points.expect(self)
        self._moved = False
        self._ending = False
        self._high_water = HIGH_WATER
        self._mark(stream.waiting if stream.waiting is Waiting.CLOSING else None)

    # For its handler

    async def message(self, frame: Frame, limit: int) -> bytes | None:
        """The next whole message; None once there is none to come. A safe point."""
        self._forbid_in_safe()
        self._mark(Waiting.MESSAGE)
        self._arrive()
        inbox = self.stream.inbox
        try:
            while True:
                if inbox.buffer or self.stream.eof:
                    await self._pass_gate()
                message = inbox.take_message(frame, limit)
                if message is not None or self.stream.eof or self._ending:
                    return message
                await self._wait_readable()
        finally:  # it goes on with something else as well after a time-out, or what is too long
            if not self._moved:
                self._mark(None)

    async def read(self, size: int) -> bytes:
        """Up to `size` more bytes of the message in hand; empty at the end."""
        await self._begin_read()
        while not self.stream.inbox.buffer and not self.stream.eof:
            await self._wait_readable()
        return self.stream.inbox.take(size)

    async def read_exactly(self, size: int) -> bytes:
        """So many more bytes of the message in hand; raises asyncio.IncompleteReadError."""
        await self._begin_read()
        while len(self.stream.inbox.buffer) < size:
            if self.stream.eof:
                raise asyncio.IncompleteReadError(self.stream.inbox.take(size), size)
            await self._wait_readable()
        return self.stream.inbox.take(size)

    async def write(self, data: bytes) -> None:
        """Queue data at once; wait while too much of it is unsent.

        Raises ConnectionResetError when the peer is gone, Retired after a migration.
        """
        self.queue(data)
        while len(self.stream.unsent) > self._high_water:
            self._arrive()
            if self._writable is None or self._writable.done():
                self._writable = self._loop.create_future()
            await asyncio.shield(self._writable)  # other handlers may wait for it, too

    def queue(self, data: bytes) -> None:
        """Queue data, however much of it is unsent; raises as `write`."""
        if self._moved:
            raise Retired(self.listener)
        self.stream.queue(data)
        if self.stream.unsent:
            self.flush()

    @contextlib.asynccontextmanager
    async def safe(self) -> AsyncIterator[None]:
        """Inside, the connection is at a safe point, whatever its handler waits for."""
        self._in_safe = True
        self._mark(Waiting.SAFE)
        self._arrive()
        try:
            yield
            await self._pass_gate()
        finally:
            self._in_safe = False
            self._mark(None)

    def close(self) -> None:
        """Close the connection, after what is unsent has gone out."""
        self.stream.say_end()
        if self.stream.unsent and not self.stream.lost:
            self.stream.eof = True
            self._mark(Waiting.CLOSING)
            self.flush()
            return
        self._end()

    # For the listener it belongs to

    async def run(self, handler: Callable[[], Awaitable[object] | None]) -> None:
        """Run its handler to the end, then close."""
        begins_handler(self.listener)
        try:
            if not self.stream.ready:
                await self._handshake()
            result = handler()
            if result is None:
                _log.error(
                    "the handler of %r is no coroutine function: write async def", self.listener
                )
            else:
                await result
        except (ConnectionError, Retired) as error:
            _log.debug("%s: %s", self.address, error)
        except Exception:
            _log.exception("handler of %s failed", self.address)
        finally:
            self._arrive()
            if not self._moved:
                self.close()

    def flush(self) -> None:
        """Go on sending what is unsent."""
        self._loop.add_writer(self._fd, self._on_writable)

    def hold(self) -> None:
        """Let the handler write all that it has, so that it comes to a safe point."""
        self._high_water = _STOPPING_WATER
        self._wake_writer()

    def resume(self) -> None:
        """Go on as before `hold`."""
        self._high_water = HIGH_WATER

    def finish(self) -> None:
        """It does not move: its handler may end what it is at, and gets no further message."""
        self._ending = True
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def let_go(self) -> None:
        """It has moved: nothing here touches it any more, but our copy of its FD stays open, and watched:
        the next instance needs the CPU now."""
        self._moved = True
        self.stream.give_up()

    def close_copy(self) -> None:
        """Close our copy of what has moved."""
        self._unwatch()
        self.stream.sock.close()

    # Inside

    def _arrive(self) -> None:
        if self._coming:
            self._coming = False
            self._safe_points.arrive(self)

    async def _begin_read(self) -> None:
        self._forbid_in_safe()
        if self._coming:  # nothing is taken before the others have come as far
            self._arrive()
            await self._pass_gate()

    async def _pass_gate(self) -> None:
        if self._ending:
            return
        await self._safe_points.pass_gate(self.listener)
        if self._moved:  # frozen: this handler goes on in another process
            await self._loop.create_future()

    async def _handshake(self) -> None:
        """Nothing waits for it, in an upgrade either: a client may take its time."""
        self._mark(Waiting.MESSAGE)
        try:
            async with asyncio.timeout(_HANDSHAKE):
                while not self.stream.ready:
                    if self.stream.eof or self._ending:
                        raise ConnectionResetError("it has ended before its handshake")
                    await self._wait_readable()
        except TimeoutError as error:
            raise ConnectionResetError("its handshake has taken too long") from error
        self._mark(None)

    async def _wait_readable(self) -> None:
        if self.stream.eof:
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
        if self._moved:  # the bytes belong to the next instance
            self._unwatch()
            return
        self.stream.receive()
        if self.stream.unsent:  # what TLS answers by itself
            self.flush()
        if self.stream.eof or (self._readable is None and self._crowded()):
            self._stop_reading()
        if self._readable and not self._readable.done():
            self._readable.set_result(None)

    def _on_writable(self) -> None:
        if self._moved:
            self._unwatch()
            return
        self.stream.flush()
        if not self.stream.unsent:
            self._loop.remove_writer(self._fd)
            if self.stream.waiting is Waiting.CLOSING:
                self._end()
        if len(self.stream.unsent) <= HIGH_WATER:
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writable and not self._writable.done():
            self._writable.set_result(None)

    def _crowded(self) -> bool:
        return len(self.stream.inbox.buffer) >= HIGH_WATER

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _unwatch(self) -> None:
        self._stop_reading()
        self._loop.remove_writer(self._fd)

    def _mark(self, waiting: Waiting | None) -> None:
        self.stream.waiting = waiting
        self._safe_points.mark(self, busy=waiting is None)

    def _end(self) -> None:
        if self.stream.sock.fileno() >= 0:
            self._unwatch()
            self.stream.close(shared=self.adopted)
        self.stream.lose()
        self._wake_writer()
        self._safe_points.mark(self, busy=False)
        self._on_end(self)

    def _forbid_in_safe(self) -> None:
        if self._in_safe:
            raise DeclarationError("peer.safe()", "nothing may be read inside: it would be lost")
