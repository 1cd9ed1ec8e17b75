# SPDX-License-Identifier: LGPL-2.1-or-later
"""One side of a migration of connections that libraries own, in this process, and clients of it."""

import asyncio
import contextlib
import fcntl
import os
import socket
import ssl
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
import uvloop
from aiohttp import web

from upgrader.aio import Adapter
from upgrader.aio.hosted_connection import HostedConnection
from upgrader.aio.hosted_listener import HostedListener
from upgrader.aio.tls_layer import TlsCrossing
from upgrader.instance.adopted import Adopted
from upgrader.instance.declarations import Protocols
from upgrader.instance.declared_socket import Bound
from upgrader.instance.frozen import Frozen
from upgrader.integrations import aiohttp as our_aiohttp
from upgrader.integrations import uvicorn as our_uvicorn
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Kind

SECONDS = 10.0
LARGE = 8 << 20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

# libuv opens a pipe of its own with the first loop, and never closes it.
uvloop.new_event_loop().close()


class Application:
    """Answers with its name; `/slow` waits for `go`, `/large` fills every buffer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = asyncio.Event()  # for /slow
        self.go = asyncio.Event()
        self.answered = asyncio.Event()

    async def answer(self, path: str) -> bytes:
        if path == "/slow":
            self.asked.set()
            await self.go.wait()
        return b"x" * LARGE if path == "/large" else self.name.encode()

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            return
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/begun":
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"A", "more_body": True})
            await self.go.wait()
            await send({"type": "http.response.body", "body": b"Z"})
            return
        body = await self.answer(scope["path"])
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self.answered.set()

    async def aiohttp(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ws":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.receive()
            return socket
        await request.read()
        if request.path == "/begun":
            begun = web.StreamResponse(headers={"Content-Length": "2"})
            await begun.prepare(request)
            await begun.write(b"A")
            await self.go.wait()
            await begun.write(b"Z")
            return begun
        return web.Response(body=await self.answer(request.path))


@contextlib.asynccontextmanager
async def adapter_of(
    kind: str, application: Application, keep_alive: float = 10 * SECONDS
) -> AsyncIterator[Adapter]:
    if kind == "aiohttp":
        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", application.aiohttp)
        options: Any = {"access_log": None, "keepalive_timeout": keep_alive}
        async with our_aiohttp.Adapter(app, **options) as of_aiohttp:
            yield of_aiohttp
        return
    config = uvicorn.Config(
        application.asgi, http=kind, interface="asgi3", lifespan="off", log_config=None
    )
    config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    async with our_uvicorn.Adapter(config) as of_uvicorn:
        yield of_uvicorn


class Side:
    """One instance's part: a library behind a listener."""

    def __init__(
        self,
        adapter: Adapter,
        sock: socket.socket,
        tls: ssl.SSLContext | None = None,
        moving: TlsCrossing | None = None,
    ) -> None:
        """`moving`: TLS connections move, and how."""
        self.moving = moving
        self.listener = Bound(Kind.LISTENER, "http")
        self.listener.open(sock)
        self.hosting = HostedListener(
            asyncio.get_running_loop(),
            Protocols(self.listener, adapter, tls, moving_tls=moving),
        )

    async def collect(self, to: "Side | None" = None) -> tuple[list[Frozen], list[LeftBehind]]:
        """What a migration does until the image is built."""
        if to:
            self.hosting.ask_tls(live=True, trust=to.moving.trust if to.moving else None)
        self.hosting.hold(for_good=False)
        await self.hosting.settle(time.monotonic() + 0.5, drained=True)
        return self.hosting.freeze()

    async def drained(self) -> None:
        """What an instance does until nothing is left."""
        await until(lambda: not self.hosting.drain())

    async def accepted(self, client: "Client") -> HostedConnection:
        """The connection of a client, once there is one."""
        name = client.writer.get_extra_info("sockname")
        found: list[HostedConnection] = []

        def there() -> bool:
            peers = {
                each.transport.get_extra_info("peername"): each for each in self.hosting.connections
            }
            found.extend(each for peer, each in peers.items() if peer == name)
            return bool(found)

        await until(there)
        return found[0]

    async def has_read(self, client: "Client") -> None:
        """Wait until all that a client has sent is out of the kernel, and with the library."""
        there = await self.accepted(client)
        sock = client.writer.get_extra_info("socket")
        await until(
            lambda: not (_pending(sock, termios.TIOCOUTQ) or _pending(there.sock, termios.FIONREAD))
        )

    def _tls(self, item: Frozen) -> object:
        return self.moving.load(*item.tls) if self.moving and item.tls else None

    def commit(self, frozen: list[Frozen], to: "Side") -> None:
        """The same process on both sides: the destination has FDs of its own."""
        moved = [
            Adopted(
                "http", duplicate(item.sock), item.identity, item.state, None, tls=to._tls(item)
            )
            for item in frozen
        ]
        to.hosting.prepare(moved)
        self.hosting.let_go()
        self.hosting.close_copies()
        self.hosting.finish()
        to.hosting.open()


def _pending(sock: HasFileno, which: int) -> int:
    """Bytes that the kernel still has: sent and not acknowledged, or received and not read."""
    (number,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), which, bytes(4)))
    return int(number)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """Let everything go on that is about to."""
    for _ in range(count):
        await asyncio.sleep(0)


def duplicate(sock: HasFileno) -> Fd:
    return Fd(os.dup(sock.fileno()))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self) -> tuple[bytes, bytes]:
        """Head, in lower case, and body of the next answer."""
        async with asyncio.timeout(SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return head, await self.reader.readexactly(int(length or 0))

    async def ask(self, data: bytes = GET) -> str:
        self.send(data)
        return (await self.receive())[1].decode()

    async def at_end(self) -> bool:
        async with asyncio.timeout(SECONDS):
            return await self.reader.read() == b""
