# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection of the asyncio server of `websockets` that can move.

It goes before the library's own: it sees what the client sends, and what the handler waits for.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

from websockets.asyncio.server import ServerConnection
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.protocol import State

from upgrader.integrations.crossing import Crossing, Handshake, Traffic

_SERVICE_RESTART = 1012  # as IANA has registered it for WebSockets


class HostedWebSocket(ServerConnection):
    """What a handler gets. `upgrader` is what it knows of a move, and leaves for the handler after it."""

    crossing: Crossing
    _receive: Callable[..., Awaitable[Any]]
    _wait: Callable[[], Awaitable[None]]
    _send: Callable[[Any], Awaitable[None]]

    @property
    def upgrader(self) -> dict[str, Any]:
        """`moved`: whether this handler has begun anew; `value` (up to 4096 bytes) and `version` (a
        number): what the one before has left, and this one may set at any time."""
        return self.crossing.extension

    def begin(self, traffic: Traffic, before: Handshake | None) -> None:
        """Know what it was opened with."""
        self.crossing = crossing = Crossing(self, traffic, before)
        self._receive = crossing.receiver(super().recv, lambda _: True)
        self._wait = crossing.receiver(super().wait_closed, lambda _: False)
        self._send = crossing.sender(super().send)

    # The library's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stand between the library and its transport, until it has answered."""
        super().connection_made(self.crossing.stand_before(cast(asyncio.Transport, transport)))

    def data_received(self, data: bytes) -> None:
        """Look at what the client sends."""
        self.crossing.came(data)
        super().data_received(data)

    def send_data(self) -> None:
        """What `broadcast` says to a client that has moved is lost."""
        if self.crossing.gone:
            self.protocol.data_to_send()
            self.crossing.lose()
        else:
            super().send_data()

    # The handler's side

    async def recv(self, decode: bool | None = None) -> Any:
        """See the library."""
        return await self._receive(decode)

    async def recv_streaming(self, decode: bool | None = None) -> AsyncIterator[Any]:
        """See the library. Between the first part of a message and the last it cannot move."""
        parts = super().recv_streaming(decode)
        crossing = self.crossing
        yield await crossing.receiver(parts.__anext__, lambda _: False)()
        async for part in parts:
            yield part
        crossing.delivered += 1

    async def wait_closed(self) -> None:
        """See the library. It can move meanwhile, if it has no message unread."""
        await self._wait()

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """See the library."""
        if text is None:
            await self._send(message)
        else:
            await self.crossing.sender(functools.partial(super().send, text=text))(message)

    async def ping(self, data: Any = None) -> Awaitable[float]:
        """See the library."""
        await self.crossing.still_here()
        return await super().ping(data)

    async def pong(self, data: Any = b"") -> None:
        """See the library."""
        await self.crossing.still_here()
        await super().pong(data)

    async def close(self, code: Any = 1000, reason: str = "") -> None:
        """See the library."""
        await self.crossing.still_here()
        await super().close(code, reason)

    # The adapter's side

    @property
    def untouched(self) -> bool:
        """Whether its client has not said a word."""
        return not self.crossing.request

    @property
    def stays(self) -> bool:
        """Whether it will not be at rest again."""
        if self.crossing.refused or self.crossing.frames.closing:
            return True
        if self.state is State.CONNECTING:
            return False
        # What another extension remembers is not known here.
        return self.state is not State.OPEN or not all(
            isinstance(each, PerMessageDeflate) and each.remote_no_context_takeover
            for each in self.protocol.extensions
        )

    @property
    def at_rest(self) -> bool:
        """Whether it could go on under a new handler."""
        return self.crossing.at_rest and not (self.paused or self.stays)

    def let_go(self) -> None:
        """It has moved."""
        self.crossing.let_go()
        if self.keepalive_task:
            self.keepalive_task.cancel()

    def say_goodbye(self) -> None:
        """Close with 1012, without waiting for the answer."""
        if self.state is State.OPEN:
            self.protocol.send_close(_SERVICE_RESTART)
            self.send_data()
        elif self.state is State.CONNECTING:
            self.transport.abort()
