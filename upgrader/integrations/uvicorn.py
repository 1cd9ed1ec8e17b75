# SPDX-License-Identifier: LGPL-2.1-or-later
"""uvicorn under an instance: its idle connections move, whatever application it serves.

Only its protocols, its lifespan and its clock are used: it binds nothing, catches no signal, and
does not shut down by itself. `python -m upgrader.asgi` is this with uvicorn's own options.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from upgrader.aio.instance import attached
from upgrader.errors import UpgradeError
from upgrader.integrations import uvicorn_websockets
from upgrader.integrations.crossing import Crossing
from upgrader.integrations.crossing_adapter import CrossingAdapter, opened_with

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # httptools is not installed
    HttpToolsProtocol = None  # type: ignore[assignment, misc]

__all__ = ["Adapter", "StartupError"]

#: The protocols whose connections can move.
_KNOWN = tuple(each for each in (H11Protocol, HttpToolsProtocol) if each is not None)
_CLOSE = (b"connection", b"close")
_REQUEST = "RequestResponseCycle."  # what uvicorn's tasks run for a request
_GRACE = 1.0  # seconds for the end of the application although the deadline has passed


class StartupError(UpgradeError):
    """The application did not start; it has said why itself."""


class UvicornAdapter(CrossingAdapter):
    """Serves the application of a `uvicorn.Config`, whose HTTP protocol is h11 or httptools.

    `async with` runs the application's lifespan: its start-up comes before anything is disturbed.
    Raises StartupError when the application refuses to start.
    """

    speaks = "http/1.1"
    announces_end = True

    def __init__(self, config: uvicorn.Config, *, move_websockets: bool = False) -> None:
        """`move_websockets`: their handlers are begun anew in the new instance; see
        docs/websockets.md for what an application promises then."""
        super().__init__()
        if not config.loaded:
            config.load()
        if move_websockets:
            self.version = self.REPLAYS
            config.ws_protocol_class = uvicorn_websockets.movable(
                config.ws_protocol_class, self._traffic
            )
        self._config = config
        self._make: Any = config.http_protocol_class
        if isinstance(self._make, type) and issubclass(self._make, _KNOWN):
            self._make = type("Hosted", (_WithClock, self._make), {})
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._clock: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._server.lifespan.startup()
        if self._server.lifespan.should_exit:
            raise StartupError("the application did not start; it has said why")
        self._clock = asyncio.create_task(self._run_clock())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop(time.monotonic() + _GRACE)

    @property
    def lifespan_state(self) -> dict[str, Any]:
        """What the application has left in its lifespan's state (`scope["state"]`) at its start-up."""
        state: dict[str, Any] = self._server.lifespan.state
        return state

    async def stop(self, deadline: float) -> None:
        """End the application: its background tasks first, then its lifespan. What is not done at
        `deadline` (of `time.monotonic`) is cancelled."""
        if self._clock is None:
            return
        self._clock.cancel()
        self._clock = None
        if tasks := set(self._server.server_state.tasks):
            _, pending = await asyncio.wait(tasks, timeout=_until(deadline))
            for task in pending:
                task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_until(deadline)):
                await self._server.lifespan.shutdown()

    async def _run_clock(self) -> None:
        """The Date header, and --limit-max-requests: another instance is asked for then, and again
        after as many requests if there comes none."""
        instance = attached.get(None)
        while True:
            await self._server.main_loop()
            if instance is None or not instance._parts.report.supervised:
                signal.raise_signal(signal.SIGTERM)
                return
            self._server.server_state.total_requests = 0  # the limit is all that it is for
            instance.replace()

    # The adapter

    def factory(self) -> asyncio.BaseProtocol:
        """A connection as uvicorn's own server makes it."""
        made: asyncio.BaseProtocol = self._make(
            config=self._config,
            server_state=self._server.server_state,
            app_state=self._server.lifespan.state,
        )
        return made

    def idle(self, protocol: Any) -> bool:
        """Between two requests, with no byte of the next one in the parser; of a WebSocket that moves,
        whether its handler waits for the next message."""
        if uvicorn_websockets.is_movable(protocol):
            return bool(protocol.at_rest)
        cycle = protocol.cycle
        if isinstance(protocol, H11Protocol):
            return (
                protocol.conn.our_state is h11.IDLE
                and protocol.conn.their_state is h11.IDLE
                and not protocol.conn.trailing_data[0]
                and (cycle is None or cycle.response_complete)
            )
        if cycle is None:
            return protocol.scope is None  # there is one from the first byte of a request on
        # The scope of a request that has begun since is not that of the last answer. A body that
        # came after its answer leaves `more_body` set: nobody knows whether all of it has come.
        return bool(
            cycle.scope is protocol.scope
            and cycle.response_complete
            and not cycle.more_body
            and not protocol.pipeline
        )

    def answering(self, protocol: Any) -> bool:
        """The application has begun with it, or is about to."""
        if uvicorn_websockets.is_movable(protocol):
            return not protocol.at_rest
        cycle = protocol.cycle
        begun = cycle is not None and not cycle.response_complete
        return bool(begun or getattr(protocol, "pipeline", None))

    def background(self) -> Collection[asyncio.Task[Any]]:
        """Requests, with the tasks that come after their answers; no WebSockets."""
        tasks = self._server.server_state.tasks
        return [each for each in tasks if _REQUEST in getattr(each.get_coro(), "__qualname__", "")]

    def load(self, saved: bytes) -> asyncio.BaseProtocol:
        """A connection that is between two requests, so its time to the next one is bounded."""
        protocol = self.factory()
        if isinstance(protocol, _WithClock):
            protocol.moved = True
        return protocol

    def stop_clock(self, protocol: Any) -> None:
        """Keep-alive."""
        if isinstance(protocol, _WithClock):
            protocol.clock_stopped = True

    def start_clock(self, protocol: Any) -> None:
        """Keep-alive, of one that is between two requests."""
        if isinstance(protocol, _WithClock):
            protocol.clock_stopped = False
            if self.idle(protocol):
                protocol.begin_anew()

    def lasting(self, protocol: Any) -> bool:
        """HTTP/2 and protocol classes that are not known here."""
        return not _is_known(protocol)

    def replayable(self, protocol: Any) -> bool:
        """A WebSocket, unless it is being closed."""
        return uvicorn_websockets.is_movable(protocol) and not protocol.stays

    def let_go(self, protocol: Any) -> None:
        """Its handler stays where it is, for ever."""
        if uvicorn_websockets.is_movable(protocol):
            protocol.let_go()

    def replay(self, secret: bytes) -> Crossing:
        """A WebSocket whose client has opened it elsewhere."""
        before = opened_with(secret)
        protocol: Any = self._config.ws_protocol_class
        if not (isinstance(protocol, type) and issubclass(protocol, uvicorn_websockets.Movable)):
            raise UpgradeError("this instance has no WebSockets that can move")
        made: Any = protocol(
            before=before,
            config=self._config,
            server_state=self._server.server_state,
            app_state=self._server.lifespan.state,
        )
        crossing: Crossing = made.crossing
        return crossing

    def finish(self, protocol: Any) -> None:
        """This answer says `Connection: close`, and so does every later one of this process. One whose
        head is out cannot say so any more, and its client may ask again: that answer is the last."""
        state = self._server.server_state
        if _CLOSE not in state.default_headers:
            self._config.encoded_headers.append(_CLOSE)  # what the clock makes the others of
            state.default_headers = [*state.default_headers, _CLOSE]
        cycle = protocol.cycle if _is_known(protocol) else None
        if cycle is None or cycle.response_started:
            return
        cycle.keep_alive = False
        if _CLOSE not in cycle.default_headers:
            cycle.default_headers = [*cycle.default_headers, _CLOSE]

    def close(self, protocol: Any) -> None:
        """A WebSocket is closed with 1012, service restart."""
        protocol.shutdown()

    def describe(self, protocol: Any) -> str:
        """The request in hand, or the path of a WebSocket."""
        scope = getattr(protocol, "scope", None) or {}
        what = scope.get("method", "HTTP") if _is_known(protocol) else "WebSocket"
        return f"{what} {scope.get('path', '')}".rstrip()


#: Its name in `upgrader.integrations.uvicorn`.
Adapter = UvicornAdapter


class _WithClock:
    """Goes before one of uvicorn's protocols, whose keep-alive does not run out while it is held."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock_stopped = False
        self.moved = False
        self.timeout_keep_alive_task: asyncio.TimerHandle | None = None

    def begin_anew(self: Any) -> None:
        """Give the next request as long as after an answer; the first one has any time."""
        running = self.timeout_keep_alive_task
        if running is not None:
            running.cancel()
        if running is not None or self.moved:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self: Any) -> None:
        if not self.clock_stopped:
            super().timeout_keep_alive_handler()  # type: ignore[misc]


def _is_known(protocol: object) -> bool:
    return isinstance(protocol, _KNOWN)


def _until(deadline: float) -> float:
    return max(deadline - time.monotonic(), _GRACE)
