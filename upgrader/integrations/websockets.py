# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio server of `websockets` under an instance: its connections move, by replay.

The library opens no socket: the instance accepts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.extensions.permessage_deflate import (
    ServerPerMessageDeflateFactory,
    enable_server_permessage_deflate,
)
from websockets.server import ServerProtocol

from upgrader.integrations.crossing import Crossing, Handshake
from upgrader.integrations.crossing_adapter import CrossingAdapter, opened_with
from upgrader.integrations.hosted_websocket import HostedWebSocket

__all__ = ["Adapter"]

#: Options of `serve`, by whom they are for; all others are about sockets.
_OF_PROTOCOL = {"origins", "extensions", "subprotocols", "max_size", "logger"}
_OF_CONNECTION = {"ping_interval", "ping_timeout", "close_timeout", "max_queue", "write_limit"}
_OF_SERVER = {"process_request", "process_response", "server_header", "open_timeout", "logger"}
_OWN = {"compression", "select_subprotocol", "create_connection"}
_KNOWN = _OF_PROTOCOL | _OF_CONNECTION | _OF_SERVER | _OWN
_GRACE = 1.0  # seconds for handlers whose connections have ended

#: The author's function for one connection.
Handler = Callable[[Any], Awaitable[None]]


class WebsocketsAdapter(CrossingAdapter):
    """Serves a handler of `websockets.asyncio.server`.

    `options` are those of its `serve`, but for addresses and TLS: these belong to the listener. Raises
    TypeError for any other. `async with` waits for the handlers' ends.
    """

    speaks = "websocket"

    def __init__(self, handler: Handler, *, move: bool = False, **options: Any) -> None:
        """`move`: handlers are begun anew in the new instance; see docs/websockets.md for what they
        promise then."""
        super().__init__()
        if unknown := options.keys() - _KNOWN:
            raise TypeError(f"no option of a handler: {', '.join(sorted(unknown))}")
        if move:
            self.version = self.REPLAYS
        self._move = move
        self._handler = handler
        self._tasks: dict[asyncio.Task[Any] | None, HostedWebSocket] = {}
        self._select = options.get("select_subprotocol")
        base = options.get("create_connection") or ServerConnection
        self._class = cast(type[HostedWebSocket], type("Hosted", (HostedWebSocket, base), {}))
        self._of_protocol = _some(options, _OF_PROTOCOL)
        self._of_protocol["extensions"] = self._extensions(options)
        self._of_connection = _some(options, _OF_CONNECTION)
        made: Any = serve(self._run, **_some(options, _OF_SERVER))
        if not isinstance(made, Server):  # before 16, what `serve` returns only has it
            made.create_server.close()
            made = made.server
        self._server: Any = made
        self._server.server = _Listening()

    def _extensions(self, options: dict[str, Any]) -> Sequence[Any] | None:
        """With `move`, clients compress each message by itself (RFC 7692, section 7.1.1.2), so that
        nothing of the compression has to move."""
        extensions = options.get("extensions")
        compression = options.get("compression", "deflate")
        if compression == "deflate":
            extensions = enable_server_permessage_deflate(extensions)
        elif compression is not None:
            raise ValueError(f"unsupported compression: {compression}")
        for each in extensions or ():
            if self._move and isinstance(each, ServerPerMessageDeflateFactory):
                each.client_no_context_takeover = True
        return extensions

    async def _run(self, connection: Any) -> None:
        task = asyncio.current_task()
        self._tasks[task] = connection
        try:
            await self._handler(connection)
        finally:
            connection.crossing.ended()
            del self._tasks[task]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = [task for task, each in self._tasks.items() if task and not each.crossing.gone]
        if left:
            _, late = await asyncio.wait(left, timeout=_GRACE)
            for task in late:
                task.cancel()

    def _make(self, before: Handshake | None) -> HostedWebSocket:
        def select(_: object, offered: Sequence[Any]) -> Any:
            assert self._select
            return self._select(connection, offered)

        protocol = ServerProtocol(
            select_subprotocol=select if self._select else None, **self._of_protocol
        )
        connection = self._class(protocol, self._server, **self._of_connection)
        connection.begin(self._traffic, before)
        return connection

    # The adapter

    def factory(self) -> asyncio.BaseProtocol:
        """A connection as the library's own server makes it."""
        return self._make(None)

    def idle(self, protocol: Any) -> bool:
        """Its client has not said a word yet; or, with `move`, its handler waits for the next message."""
        return bool(protocol.untouched or (self._move and protocol.at_rest))

    def lasting(self, protocol: Any) -> bool:
        """From its first word on."""
        return not protocol.untouched

    def replayable(self, protocol: Any) -> bool:
        """With `move`, unless it is being closed."""
        return self._move and not protocol.stays

    def let_go(self, protocol: Any) -> None:
        """Its handler stays where it is, for ever."""
        protocol.let_go()

    def replay(self, secret: bytes) -> Crossing:
        """One whose client has opened it elsewhere."""
        if not self._move:
            raise TypeError("handlers do not begin anew here")
        return self._make(opened_with(secret)).crossing

    def close(self, protocol: Any) -> None:
        """Close it with 1012, service restart."""
        protocol.say_goodbye()

    def describe(self, protocol: Any) -> str:
        """Its path."""
        path = protocol.request.path.partition("?")[0] if protocol.request else ""
        return f"WebSocket {path}".rstrip()


#: Its name in `upgrader.integrations.websockets`.
Adapter = WebsocketsAdapter


class _Listening:
    """Stands for the asyncio server that the library would have: the instance accepts."""

    sockets = ()

    def is_serving(self) -> bool:
        return True

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def close(self) -> None:
        """Do nothing."""

    async def wait_closed(self) -> None:
        """Return at once."""


def _some(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}
