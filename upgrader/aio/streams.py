# SPDX-License-Identifier: LGPL-2.1-or-later
"""`start_server` for programs written against asyncio's StreamReader and StreamWriter.

Says which of their connections move; how they do is `hosting`'s. For state that goes with a
connection there is `@instance.connections`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

from upgrader.aio.adapter import Adapter
from upgrader.aio.instance import AsyncioInstance, attached
from upgrader.errors import DeclarationError
from upgrader.instance.handles import Listener

if TYPE_CHECKING:
    import ssl

Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


_LIMIT = 65536  # bytes, asyncio's own default
#: What asyncio.start_server knows besides and an instance decides by itself.
_DECIDED = {"backlog", "reuse_address", "start_serving", "family", "flags"}


async def start_server(
    client_connected_cb: Connected,
    host: str | None = None,
    port: int = 0,
    *,
    limit: int = _LIMIT,
    ssl: ssl.SSLContext | None = None,
    name: str = "",
    stateless: bool = False,
    drains: bool = False,
    **others: Any,
) -> Server:
    """Like `asyncio.start_server`, for a program inside `async with upgrader.attach(...)`.

    Which connections move: a handler that is called anew has lost its local variables and does not
    know how far it had come. So a connection moves only while calling the handler anew goes
    unnoticed: its handler waits in a read (`read`, `readline`, `readuntil`, `readexactly`) that has
    taken nothing yet, nothing that was written is unsent, and

    - nothing at all has been read or written before: the handler is at its first message; or
    - `stateless` is set. With it you promise that your handler keeps nothing from one message to
      the next, greets nobody, and reads each message by *one* call: then it waits for the next
      message wherever it waits. With a header in one call and a body in another, that is not so.

    What the reader has buffered moves along. All other connections go on in the source for up to
    `live-drain-timeout` (live); in a restart their handlers read the end of the stream at once, because
    nobody is served until they have ended. With `ssl` only the listener moves.

    If the program declares a state, an upgrade waits for handlers that are at something, and is
    refused if they do not end it in time; with `drains` they end in the source all the same, and what
    they write to a state then raises Retired.

    `name` is that of the listener, by default `tcp-PORT`: give one to change the port later.
    Nothing is served before `serve_forever`, or `instance.serve`. Raises DeclarationError outside
    of `attach`, and for what only a new socket can have (`sock`, `reuse_port`).
    """
    if refused := sorted(others.keys() - _DECIDED):
        raise DeclarationError(
            "start_server()",
            f"{', '.join(refused)}: the instance takes over the listener, or binds it itself",
        )
    host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    adapter = Streams(client_connected_cb, limit, stateless=stateless)
    return _declare(name or f"tcp-{port}", bind, adapter, ssl, drains=drains)


async def start_unix_server(
    client_connected_cb: Connected,
    path: str,
    *,
    limit: int = _LIMIT,
    ssl: ssl.SSLContext | None = None,
    name: str = "unix",
    stateless: bool = False,
    drains: bool = False,
) -> Server:
    """Like `asyncio.start_unix_server`, under the rules of `start_server`."""
    adapter = Streams(client_connected_cb, limit, stateless=stateless)
    return _declare(name, f"unix:{path}", adapter, ssl, drains=drains)


def _declare(
    name: str, bind: str, adapter: Streams, tls: ssl.SSLContext | None, *, drains: bool
) -> Server:
    try:
        instance = attached.get()
    except LookupError:
        raise DeclarationError(
            "start_server()", "needs an instance", remedy="async with upgrader.attach(...) first"
        ) from None
    listener = instance.listener(name, bind=bind)
    instance.protocols(listener, adapter, tls=tls, drains=drains)
    return Server(instance, listener)


class Server:
    """What programs do with an `asyncio.Server`."""

    def __init__(self, instance: AsyncioInstance, listener: Listener) -> None:
        self._instance = instance
        self._listener = listener

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets, once this instance serves."""
        return tuple(self._listener.sockets) if self.is_serving() else ()

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return self._instance._runtime.begun and not self._instance._runtime.replaced

    async def serve_forever(self) -> None:
        """Serve until another instance has taken over, or this one is stopped: `instance.serve`.
        Raises DeclarationError where it serves already: once is enough for all servers."""
        if self._instance._runtime.begun:
            raise DeclarationError(
                "serve_forever()", "this instance serves already",
                remedy="with several servers, await instance.serve() once",
            )  # fmt: skip
        await self._instance.serve()

    def close(self) -> None:
        """Does nothing: the listener belongs to the instance, and may have moved."""

    async def wait_closed(self) -> None:
        """Returns at once: `serve_forever` has waited for all there was."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class Reader(asyncio.StreamReader):
    """A StreamReader that knows whether its handler waits for a message of which it has nothing."""

    def __init__(self, limit: int, unread: bytes) -> None:
        super().__init__(limit)
        self._loop_running = asyncio.get_running_loop()
        self.taken = False  #: anything was read, ever
        self.ended = False
        self._calls = 0  # reads under way, which call each other
        self._taken_in_call = False
        self._waking = 0  # times that the handler has been woken, and has not run yet
        if unread:
            self.feed_data(unread)

    @property
    def waiting(self) -> bool:
        """Whether a read is under way that has taken nothing and is not about to."""
        return self._calls > 0 and not self._taken_in_call and not self._waking and not self.ended

    def feed_data(self, data: Any) -> None:
        """As asyncio's; what comes after `feed_eof` is for nobody."""
        if self.ended:
            return
        super().feed_data(data)
        # The handler that waits for it has been scheduled just now, so it runs before this.
        self._waking += 1
        self._loop_running.call_soon(self._has_run)

    def feed_eof(self) -> None:
        """As asyncio's."""
        self.ended = True
        super().feed_eof()

    def _has_run(self) -> None:
        self._waking -= 1

    async def read(self, n: int = -1) -> bytes:
        """As asyncio's."""
        with self._call():
            return self._took(await super().read(n))

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        """As asyncio's."""
        with self._call():
            return self._took(await super().readuntil(separator))

    async def readline(self) -> bytes:
        """As asyncio's."""
        with self._call():
            return self._took(await super().readline())

    async def readexactly(self, n: int) -> bytes:
        """As asyncio's."""
        with self._call():
            return self._took(await super().readexactly(n))

    @contextmanager
    def _call(self) -> Iterator[None]:
        if not self._calls:
            self._taken_in_call = False
        self._calls += 1
        try:
            yield
        except (asyncio.IncompleteReadError, ValueError):  # it has taken what there was
            self._took(b"?")
            raise
        finally:
            self._calls -= 1

    def _took(self, data: bytes) -> bytes:
        if data:
            self.taken = self._taken_in_call = True
        return data


class Writer(asyncio.StreamWriter):
    """A StreamWriter that knows whether it was used."""

    def __init__(self, made: asyncio.StreamWriter, protocol: Protocol, reader: Reader) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(made.transport, protocol, reader, loop)
        self._made = made  # collected, it would close the transport
        self.used = False  #: anything was written, ever

    def write(self, data: Any) -> None:
        """As asyncio's."""
        self.used = True
        super().write(data)

    def writelines(self, data: Any) -> None:
        """As asyncio's."""
        self.used = True
        super().writelines(data)


class Protocol(asyncio.StreamReaderProtocol):
    """asyncio's own, with a reader and a writer that know how far their handler has come."""

    def __init__(self, connected: Connected, limit: int, unread: bytes) -> None:
        self.reader = Reader(limit, unread)
        self.writer: Writer | None = None
        self._connected = connected
        super().__init__(self.reader, self._begin)

    def _begin(self, _: asyncio.StreamReader, made: asyncio.StreamWriter) -> Awaitable[None] | None:
        self.writer = Writer(made, self, self.reader)
        return self._connected(self.reader, self.writer)


class Streams(Adapter):
    """The connections of one `start_server`."""

    speaks = "streams"

    def __init__(self, connected: Connected, limit: int, *, stateless: bool) -> None:
        self._connected = connected
        self._limit = limit
        self._stateless = stateless

    def factory(self) -> asyncio.BaseProtocol:
        """A handler of its own for each connection."""
        return Protocol(self._connected, self._limit, b"")

    def idle(self, protocol: Any) -> bool:
        """As `start_server` says."""
        mine = cast(Protocol, protocol)
        reader, writer = mine.reader, mine.writer
        if not reader.waiting or writer is None:
            return False
        return self._stateless or not (reader.taken or writer.used)

    def save(self, protocol: Any) -> bytes | None:
        """What the reader has buffered: the beginning of the message that is waited for."""
        return bytes(_buffered(protocol.reader))

    def load(self, saved: bytes) -> asyncio.BaseProtocol:
        """The handler is called anew, and reads that first."""
        return Protocol(self._connected, self._limit, saved)

    def lasting(self, protocol: Any) -> bool:
        """A handler that is not stateless and beyond its first message."""
        mine = cast(Protocol, protocol)
        used = mine.writer is not None and mine.writer.used
        return not self._stateless and (mine.reader.taken or used)

    def close(self, protocol: Any) -> None:
        """The handler ends what it is at, and then reads the end of the stream."""
        protocol.reader.feed_eof()

    def describe(self, protocol: Any) -> str:
        """Nothing is known of what it speaks."""
        return "stream"


def _buffered(reader: asyncio.StreamReader) -> bytearray:
    # Private, but of this name and type since asyncio is there; a test watches over it.
    buffer: bytearray = reader._buffer  # type: ignore[attr-defined]
    return buffer
