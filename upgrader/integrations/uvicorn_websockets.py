# SPDX-License-Identifier: LGPL-2.1-or-later
"""The WebSockets of uvicorn, in all its implementations, made so that they can move.

A class of ours goes before uvicorn's: it sees what the client sends and what the handler waits for, and has
the server answer `client_no_context_takeover` (RFC 7692, section 7.1.1.2), so that nothing of the
compression has to move.
"""

from __future__ import annotations

import asyncio
from typing import Any

from upgrader.integrations.crossing import Crossing, Handshake, Traffic

#: What uvicorn calls them; any other class is not known here, and its connections do not move.
_KNOWN = ("WebSocketProtocol", "WebSocketsSansIOProtocol", "WSProtocol")


def movable(protocol_class: Any, traffic: Traffic) -> Any:
    """The class to use instead of uvicorn's; another one is returned as it is."""
    if not (isinstance(protocol_class, type) and protocol_class.__name__ in _KNOWN):
        return protocol_class
    made = {"traffic": traffic}
    return type("Movable", (_OF_NAME[protocol_class.__name__], protocol_class), made)


def is_movable(protocol: object) -> bool:
    """Whether a protocol is of such a class."""
    return isinstance(protocol, Movable)


class Movable:
    """Goes before a protocol of uvicorn's for WebSockets."""

    traffic: Traffic

    def __init__(self: Any, *, before: Handshake | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.crossing = Crossing(self, self.traffic, before)
        if before:
            self.logger = _Quiet(self.logger, self.crossing)
            # The library below has lines of its own.
            if hasattr(getattr(self, "conn", None), "logger"):
                self.conn.logger = self.logger
        self._application = self.app
        self.app = self._run_application
        self._task: asyncio.Task[Any] | None = None
        self.take_no_context()

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        """Stand between the library and its transport, until it has answered."""
        super().connection_made(self.crossing.stand_before(transport))  # type: ignore[misc]

    def data_received(self: Any, data: bytes) -> None:
        """Look at what the client sends."""
        self.crossing.came(data)
        super().data_received(data)  # type: ignore[misc]

    async def _run_application(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        crossing = self.crossing
        self._task = asyncio.current_task()
        scope["extensions"] = {**scope.get("extensions", {}), "upgrader": crossing.extension}
        try:
            return await self._application(
                scope, crossing.receiver(receive, _is_message), crossing.sender(send)
            )
        finally:
            crossing.ended()

    @property
    def stays(self: Any) -> bool:
        """Whether it will not be at rest again."""
        return bool(self.crossing.refused or self.crossing.frames.closing or self.is_ending())

    @property
    def at_rest(self: Any) -> bool:
        """Whether it could go on under a new handler."""
        return bool(self.crossing.at_rest and not self.is_ending() and self.is_quiet())

    def let_go(self: Any) -> None:
        """It has moved."""
        self.crossing.let_go()
        self.tasks.discard(self._task)  # nobody waits for it, and nobody cancels it
        self.connections.discard(self)
        self.end_pings()

    # What differs between the implementations

    def take_no_context(self) -> None:
        """Have the server answer `client_no_context_takeover`."""
        raise NotImplementedError

    def is_ending(self) -> bool:
        """Whether a close handshake has begun, or it was lost."""
        raise NotImplementedError

    def is_quiet(self) -> bool:
        """Whether the library is at nothing by itself."""
        raise NotImplementedError

    def end_pings(self) -> None:
        """Send no pings any more, and wait for no pong."""
        raise NotImplementedError


class _Quiet:
    """uvicorn's logger, without a line for each handler that begins anew: nobody has connected, and while
    thousands of lines are written all clients wait. Errors are logged as ever."""

    def __init__(self, logger: Any, crossing: Crossing) -> None:
        self._logger = logger
        self._crossing = crossing

    def info(self, *message: Any, **options: Any) -> None:
        """Unless its handler is about to begin anew."""
        if not self._crossing.barred:
            self._logger.info(*message, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)


class _SansIO(Movable):
    """Of `websockets` and `wsproto`, where uvicorn keeps the state itself."""

    def take_no_context(self: Any) -> None:
        for extension in self.conn.available_extensions or ():
            extension.client_no_context_takeover = True

    def is_ending(self: Any) -> bool:
        lost = self.close_sent or self.disconnected
        return bool(lost or (self.handshake_complete and self.conn.state.name != "OPEN"))

    def is_quiet(self: Any) -> bool:
        return bool(self.writable.is_set())

    def end_pings(self: Any) -> None:
        self.stop_keepalive()


class _WsProto(_SansIO):
    def take_no_context(self: Any) -> None:
        send = self.conn.send

        def send_with_it(event: Any) -> Any:
            for extension in getattr(event, "extensions", ()):
                extension.client_no_context_takeover = True
            return send(event)

        self.conn.send = send_with_it


class _Legacy(Movable):
    """Of `websockets` before its own sans-I/O: tasks of the library read and send pings."""

    def take_no_context(self: Any) -> None:
        for extension in self.available_extensions or ():
            extension.client_no_context_takeover = True

    def is_ending(self: Any) -> bool:
        return self.closed_event.is_set() or self.state.name not in ("CONNECTING", "OPEN")

    def is_quiet(self: Any) -> bool:
        # What the library has not looked at must be of the unfinished message: a ping would be lost.
        unread, rest = len(self.reader._buffer), self.crossing.frames.rest
        sends_parts = self._fragmented_message_waiter is not None
        return rest is not None and unread <= len(rest) and not (self._paused or sends_parts)

    def end_pings(self: Any) -> None:
        self.keepalive_ping_task.cancel()


_OF_NAME = dict(zip(_KNOWN, (_Legacy, _SansIO, _WsProto), strict=True))


def _is_message(event: Any) -> bool:
    return bool(event["type"] == "websocket.receive")
