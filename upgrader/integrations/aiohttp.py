# SPDX-License-Identifier: LGPL-2.1-or-later
"""aiohttp's web server under an instance: its idle connections move, whatever application it serves.

Sites, signals and `web.run_app` are not used: the instance accepts, and decides when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any, Self

from aiohttp import hdrs, web

from upgrader.aio import adapter

__all__ = ["Adapter"]

_END_OF_HEAD = b"\r\n\r\n"
_SERVICE_RESTART = 1012  # as IANA has registered it for WebSockets
_PATIENCE = 0.5  # seconds for a client to answer that
_NEVER = 86400.0  # seconds; nothing is held so long
#: Seconds in which requests may end at clean-up: the instance has waited for them, and cut them.
_CLEAN_UP = 0.1


class AiohttpAdapter(adapter.Adapter):
    """Serves a `web.Application` that no runner has been made of yet.

    `async with` runs what the application has on start-up and clean-up. `options` are those of
    `web.AppRunner`. Raises RuntimeError for an application that is frozen.
    """

    speaks = "http/1.1"
    announces_end = True
    says_goodbye = True

    def __init__(self, app: web.Application, **options: Any) -> None:
        app.on_response_prepare.append(self._prepare)
        options.setdefault("shutdown_timeout", _CLEAN_UP)
        self._runner = web.AppRunner(app, handle_signals=False, **options)
        self._last: set[web.RequestHandler] = set()  # this process ends with them
        self._websockets: dict[web.RequestHandler, web.WebSocketResponse] = {}
        self._closing: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()

    def factory(self) -> asyncio.BaseProtocol:
        """A connection as aiohttp's own server makes it, with an eye on where a request ends."""
        assert self._runner.server is not None, "async with comes before serve()"
        return _Watched(self._runner.server(), self._websockets)

    def idle(self, protocol: Any) -> bool:
        """Its task waits for a request, and no byte of that is in the parser."""
        inner = protocol.inner
        return bool(protocol.at_boundary and inner._waiter is not None and not inner._messages)

    def answering(self, protocol: Any) -> bool:
        """Its task does anything but wait for a request."""
        return protocol.inner._waiter is None or bool(protocol.inner._messages)

    def stop_clock(self, protocol: Any) -> None:
        """keepalive_timeout: while there is a timer, aiohttp begins no other, and this one is none."""
        inner = protocol.inner
        if inner._keepalive_handle is not None:
            inner._keepalive_handle.cancel()
        inner._keepalive_handle = asyncio.get_running_loop().call_later(_NEVER, lambda: None)

    def start_clock(self, protocol: Any) -> None:
        """keepalive_timeout, as after an answer."""
        inner = protocol.inner
        if inner._keepalive_handle is not None:
            inner._keepalive_handle.cancel()
            inner._keepalive_handle = None
        if not inner.keepalive_timeout:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = now + inner.keepalive_timeout
        # What the timer compares with the time when it is due; before 3.10.8 it was the last answer.
        for name, value in (("_next_keepalive_close_time", due), ("_keepalive_time", now)):
            if hasattr(inner, name):
                setattr(inner, name, value)
        inner._keepalive_handle = loop.call_at(due, inner._process_keepalive)

    def lasting(self, protocol: Any) -> bool:
        """A WebSocket."""
        inner = protocol.inner
        # The parser of a WebSocket; before 3.14 nothing else tells that there is one.
        return inner._payload_parser is not None or getattr(inner, "_upgraded", False)

    def finish(self, protocol: Any) -> None:
        """The answer says `Connection: close`."""
        self._last.add(protocol.inner)

    def close(self, protocol: Any) -> None:
        """A WebSocket is closed with 1012, service restart; the handler of anything else, and of a
        client that does not answer, is cancelled."""
        task = protocol.inner._task_handler
        if opened := self._websockets.pop(protocol.inner, None):
            closing = asyncio.ensure_future(_say_goodbye(opened, task))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        elif task:
            task.cancel()

    def describe(self, protocol: Any) -> str:
        """The request in hand."""
        request = protocol.inner._current_request
        return f"{request.method} {request.path}" if request else "HTTP"

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, web.WebSocketResponse):
            self._websockets[request.protocol] = response
        if request.protocol in self._last:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"  # the others have been set already


async def _say_goodbye(opened: web.WebSocketResponse, task: asyncio.Task[None] | None) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_PATIENCE):
            await opened.close(code=_SERVICE_RESTART)
    if task:
        task.cancel()


#: Its name in `upgrader.integrations.aiohttp`.
Adapter = AiohttpAdapter


class _Watched(asyncio.Protocol):
    """aiohttp's protocol, with a note of whether the last byte that it got was the end of a
    request: its parser, in C, keeps the beginning of the next one to itself."""

    def __init__(
        self, inner: web.RequestHandler, websockets: dict[web.RequestHandler, Any]
    ) -> None:
        """`websockets`: those of all connections; one that is lost takes its own out."""
        self.inner = inner
        self._websockets = websockets
        self._fed = 0  # bytes since the last boundary
        self._tail = b""  # the last of them
        self._head = bytearray()  # all of them, until there is a whole head of a request
        self._end = -1  # where the only request since then ends, by its Content-Length
        self._payload: Any = None  # of the newest request

    def _begin(self) -> None:
        self._fed, self._tail, self._head, self._end, self._payload = 0, b"", bytearray(), -1, None

    @property
    def at_boundary(self) -> bool:
        """Whether nothing of a next request has come. If in doubt, it has."""
        if not self._fed:
            return True
        if self._payload is None or not self._payload.is_eof():
            return False
        # A rest that ends like a head would be a request of its own, and the newest.
        return self._tail == _END_OF_HEAD or self._fed == self._end

    def data_received(self, data: bytes) -> None:
        if self.at_boundary:
            self._begin()
        self._fed += len(data)
        self._tail = (self._tail + data)[-len(_END_OF_HEAD) :]
        before = self.inner._request_count
        self.inner.data_received(data)
        new = self.inner._request_count - before
        if self._payload is None:
            self._head += data
        if new and self.inner._messages:
            message, payload = self.inner._messages[-1]
            only = new == 1 and self._payload is None
            self._end = self._find_end(message) if only else -1
            self._payload = payload
            self._head.clear()

    def _find_end(self, message: Any) -> int:
        length = getattr(message, "headers", {}).get("Content-Length", "")
        head = self._head.find(_END_OF_HEAD)
        return head + len(_END_OF_HEAD) + int(length) if length.isdecimal() and head >= 0 else -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.inner.connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._websockets.pop(self.inner, None)
        self.inner.connection_lost(exc)

    def eof_received(self) -> None:
        self.inner.eof_received()

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()
