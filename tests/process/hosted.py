# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs whose connections other libraries own: `python hosted.py KIND PATH VERSION`."""

import asyncio
import os
import signal
import sys
from typing import Any

from aiohttp import web

import upgrader
from upgrader.aio import start_unix_server
from upgrader.integrations.aiohttp import Adapter

KIND, PATH, VERSION = sys.argv[1:]


async def aiohttp() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=VERSION)

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"data: x\n\n")
            await asyncio.sleep(0.05)

    async def big(request: web.Request) -> web.Response:
        return web.Response(body=bytes(1 << 26))

    app = web.Application()
    app.add_routes([web.get("/", answer), web.get("/events", events), web.get("/big", big)])
    async with upgrader.attach("asgi") as instance:
        door = instance.listener("http", bind=f"unix:{PATH}")
        async with Adapter(app) as adapter:
            instance.protocols(door, adapter)
            await instance.serve()


@upgrader.state("hits")
class Hits:
    count: int = 0


async def stateful(*, drains: bool = False) -> None:
    """Counts in a state: `/slow` only once there is a file beside the socket, `/ws` per message."""

    async with upgrader.attach("asgi") as instance:
        hits = instance.state(Hits)

        async def answer(request: web.Request) -> web.Response:
            return web.Response(text=f"{VERSION} {hits.value.count}")

        async def slow(request: web.Request) -> web.Response:
            while not os.path.exists(f"{PATH}.go"):
                await asyncio.sleep(0.01)
            hits.value.count += 1
            return web.Response(text=f"{VERSION} {hits.value.count}")

        async def chat(request: web.Request) -> web.WebSocketResponse:
            opened = web.WebSocketResponse()
            await opened.prepare(request)
            async for _ in opened:
                hits.value.count += 1
            return opened

        app = web.Application()
        app.router.add_get("/", answer)
        app.router.add_get("/slow", slow)
        app.router.add_get("/ws", chat)
        listener = instance.listener("http", bind=f"unix:{PATH}")
        async with Adapter(app) as adapter:
            instance.protocols(listener, adapter, drains=drains)
            await instance.serve()


async def drains() -> None:
    await stateful(drains=True)


async def streams() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(VERSION)}\r\n\r\n"
            writer.write(f"{head}{VERSION}".encode())

    async with upgrader.attach("asgi"):
        server = await start_unix_server(answer, PATH, name="http", stateless=True)
        async with server:
            await server.serve_forever()


async def handler() -> None:
    async def answer(peer: Any) -> None:
        async for _ in peer.messages(b"\r\n\r\n"):
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(VERSION)}\r\n\r\n"
            await peer.write(f"{head}{VERSION}".encode())

    async with upgrader.attach("asgi") as instance:
        door = instance.listener("http", bind=f"unix:{PATH}")
        instance.connections(door)(answer)
        await instance.serve()


async def stubborn() -> None:
    """Like a library with a long shutdown of its own."""
    try:
        await handler()
    finally:
        await asyncio.sleep(3600)


async def signals() -> None:
    """Like a library that thinks the process is its own."""

    def handle(*_: object) -> None:
        print("theirs", file=sys.stderr, flush=True)
        raise SystemExit(9)

    signal.signal(signal.SIGTERM, handle)
    await handler()


if __name__ == "__main__":
    asyncio.run(
        {
            "aiohttp": aiohttp,
            "stateful": stateful,
            "drains": drains,
            "streams": streams,
            "handler": handler,
            "signals": signals,
            "stubborn": stubborn,
        }[KIND]()
    )
