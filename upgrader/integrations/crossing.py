# SPDX-License-Identifier: LGPL-2.1-or-later
"""One WebSocket that can move: what it was opened with, whether it is at rest, and its handler's anew.

Its handler is begun anew in the new instance, with the opening handshake that its client sent once: the
client does not see that, and what the library answers this time is compared with what it has answered
then. The handler of the source neither goes on nor ends: none of its calls returns any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from upgrader.integrations.websocket_frames import Frames

#: Bytes of the head of an answer, and of what a handler may leave for the next one.
_MAX_HEAD, MAX_VALUE = 1 << 16, 4096
_END_OF_HEAD = b"\r\n\r\n"
_ACCEPTED = b"HTTP/1.1 101 "
_OF_THE_DAY = (b"date", b"server")  # headers of an answer that may differ


class Handshake(msgspec.Struct, frozen=True, array_like=True):
    """The heads of an opening handshake, and what the handler has left. All of it may be secret."""

    request: bytes
    answer: bytes
    value: bytes = b""
    version: int = 0


class Traffic:
    """What all WebSockets of one adapter have in common."""

    def __init__(self) -> None:
        self.last = 0.0  #: when a handler has sent or received something, as of `time.monotonic`
        #: Messages that handlers wanted to send after their connections had moved, by connection.
        self.in_hand: dict[int, int] = {}
        self._kept: list[object] = []

    def keep(self, each: object) -> None:
        """Keep something until the end of this process: what waits for ever would run its `finally`
        when it is collected."""
        self._kept.append(each)


class Crossing:
    """What is known of one WebSocket; made before its library gets its transport."""

    def __init__(self, protocol: Any, traffic: Traffic, before: Handshake | None = None) -> None:
        """`protocol`: the library's, whose attribute `transport` is set here; `before`: what it was
        opened with, if its handler is begun anew."""
        self.protocol = protocol
        self.frames = Frames()
        self.request = before.request if before else b""
        self.receiving = 0  #: calls that wait for a message
        self.sending = 0
        self.delivered = 0  #: messages that the handler has got
        self.answered = False  #: the client has got its 101, or had it already
        self.gone = False  #: it has moved
        self.refused = False  #: its handler, begun anew, does not go on where it was
        self.decided: asyncio.Future[bool] | None = None
        self.extension: dict[str, Any] = {
            "moved": before is not None,
            "version": before.version if before else 0,
            "value": before.value if before else b"",
        }
        self._before = before
        self._traffic = traffic
        self._head = b""
        self.barred = before is not None  #: nothing of its client is let in yet
        self._opened = False  # the request has come whole
        self._transport: Any = None
        if before:
            self.decided = asyncio.get_running_loop().create_future()

    # The library's side

    def stand_before(self, transport: asyncio.Transport) -> Any:
        """What the library gets for its transport, until it has answered the opening handshake."""
        self._transport = transport
        return _FirstAnswer(self)

    def came(self, data: bytes) -> None:
        """Note what the client has sent: the head of its request, then frames."""
        if self._opened:
            self.frames.feed(data)
        elif len(self.request) < _MAX_HEAD:  # else it never moves
            head, end, rest = (self.request + data).partition(_END_OF_HEAD)
            self.request = head + end
            self._opened = bool(end)
            if rest:
                self.frames.feed(rest)

    def write(self, data: bytes) -> None:
        """Look at what the library writes: the head of its answer is the first of it."""
        if self.refused:
            return
        if self.answered or not (self.barred or len(self._head) < _MAX_HEAD):
            self._transport.write(data)
            return
        self._head += data
        if not self.barred:
            self._transport.write(data)
        head, end, rest = self._head.partition(_END_OF_HEAD)
        if not end:
            return
        self._head = head
        if self._before is None:
            self.answered = head.startswith(_ACCEPTED)
            self.protocol.transport = self._transport
        elif _comparable(head) == _comparable(self._before.answer):
            self.answered = True
            if rest:
                self._transport.write(rest)
            self._look()
        else:
            self.refuse()

    def close(self) -> None:
        """The library closes: a client whose handler is begun anew is told to dial again instead."""
        if self.barred:
            self.refuse()
        else:
            self._transport.close()

    def write_eof(self) -> None:
        """The library writes no more: as `close`."""
        if self.barred:
            self.refuse()
        else:
            self._transport.write_eof()

    # The application's side

    def receiver(
        self, receive: Callable[..., Awaitable[Any]], is_message: Callable[[Any], bool]
    ) -> Any:
        """Wrap what the handler receives with, or waits for its client with."""
        traffic = self._traffic

        async def received(*options: Any) -> Any:
            self.receiving += 1
            if self.decided:
                self._look()
            try:
                message = await receive(*options)
            except BaseException:
                if self.gone:
                    await self._for_ever()
                raise
            finally:
                self.receiving -= 1
            if self.gone:
                await self._for_ever()
            self.delivered += is_message(message)
            traffic.last = time.monotonic()
            return message

        return received

    def sender(self, send: Callable[..., Awaitable[Any]]) -> Any:
        """Wrap what the handler sends with."""
        traffic = self._traffic

        async def sent(*message: Any) -> None:
            if self.gone:
                self.lose()
                await self._for_ever()
            self.sending += 1
            try:
                await send(*message)
            finally:
                self.sending -= 1
            traffic.last = time.monotonic()

        return sent

    async def still_here(self) -> None:
        """Return unless it has moved: then its handler does nothing any more."""
        if self.gone:
            await self._for_ever()

    def lose(self) -> None:
        """Count a message that somebody wanted to send after it had moved."""
        lost = self._traffic.in_hand
        lost[id(self)] = lost.get(id(self), 0) + 1

    # The source

    @property
    def at_rest(self) -> bool:
        """Whether its handler waits for a message, has got all that have come, and sends none; what
        has come of the next one is known."""
        frames = self.frames
        return (
            self.answered
            and self._opened
            and bool(self.receiving)
            and not (self.sending or self.refused or frames.closing)
            and frames.messages == self.delivered
            and frames.rest is not None
        )

    def handshake(self) -> Handshake:
        """What its handler is begun anew with; raises ValueError for a value that cannot move."""
        value, version = self.extension.get("value"), self.extension.get("version")
        if not isinstance(value, bytes) or len(value) > MAX_VALUE:
            raise ValueError(f"its value is not of up to {MAX_VALUE} bytes")
        if not isinstance(version, int) or not 0 <= version < 1 << 31:
            raise ValueError("the version of its value is not a number from 0 on")
        return Handshake(self.request, self._head, value, version)

    def let_go(self) -> None:
        """It has moved: its handler gets nothing any more, and none of its calls returns."""
        self.gone = True
        self._transport = self.protocol.transport = _Gone(self._transport)
        self._traffic.keep(self.protocol)

    async def _for_ever(self) -> None:
        """Wait, whoever cancels it: what the handler would do then is the new one's to do."""
        while True:
            never = asyncio.get_running_loop().create_future()
            self._traffic.keep(never)
            try:
                await never
            except asyncio.CancelledError:
                continue

    # The destination: implements `aio.adapter.Replay`

    def begin(self, transport: asyncio.Transport) -> None:
        """Have the library take the opening handshake from the client that had sent it once."""
        self.protocol.connection_made(transport)
        request, self.request = self.request, b""
        self.protocol.data_received(request)

    def refuse(self) -> None:
        """Its handler does not go on where it was, or not in time."""
        self.refused = True
        if self.decided and not self.decided.done():
            self.decided.set_result(False)

    def let_in(self) -> None:
        """All handlers have begun: the library gets its transport."""
        self.barred = False
        self.decided = None
        self.protocol.transport = self._transport

    def ended(self) -> None:
        """Its handler has returned or raised."""
        if self.barred:
            self.refuse()

    def _look(self) -> None:
        if self.decided and not self.decided.done() and self.answered and self.receiving:
            self.decided.set_result(True)


class _FirstAnswer:
    """Stands for a transport, for a library that has not answered the opening handshake yet."""

    def __init__(self, crossing: Crossing) -> None:
        self._crossing = crossing

    def write(self, data: bytes) -> None:
        self._crossing.write(bytes(data))

    def writelines(self, lines: Any) -> None:
        self._crossing.write(b"".join(lines))

    def close(self) -> None:
        self._crossing.close()

    def abort(self) -> None:
        self._crossing.close()

    def write_eof(self) -> None:
        self._crossing.write_eof()

    def is_closing(self) -> bool:
        return self._crossing.refused or bool(self._crossing._transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._crossing._transport, name)


class _Gone(asyncio.Transport):
    """The transport of a connection that has moved: whatever a library does with it, nothing happens."""

    def __init__(self, real: asyncio.Transport) -> None:
        names = ("peername", "sockname", "sslcontext", "ssl_object", "cipher")
        super().__init__({name: real.get_extra_info(name) for name in names})

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def _nothing(self, *_: object, **__: object) -> None:
        """Do nothing."""

    close = abort = write = writelines = pause_reading = resume_reading = _nothing
    set_write_buffer_limits = set_protocol = write_eof = _nothing


def _comparable(head: bytes) -> list[tuple[bytes, bytes]]:
    """The head of an answer, without what differs each time and with its headers in any order."""
    first, *lines = head.split(b"\r\n")
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() not in _OF_THE_DAY:
            headers.append((name.lower(), value.strip()))
    return [(b"", first), *sorted(headers)]
