# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handlers of chat_app.py on the asyncio server of `websockets`: `library_app.py PATH [close] [uvloop]`."""

import asyncio
import os
import sys

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast

import upgrader
from upgrader.integrations.hosted_websocket import HostedWebSocket
from upgrader.integrations.websockets import Adapter

PATH, *HOW = sys.argv[1:]
VERSION = os.environ["VERSION"]
active: set[ServerConnection] = set()


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


async def chat(client: HostedWebSocket, name: str) -> None:
    active.add(client)
    try:
        async for data in client:
            for each in list(active):
                await each.send(f"{VERSION} {name}: {data}")
    finally:
        active.remove(client)
        broadcast(active, f"{name} left")


async def echo(client: HostedWebSocket, name: str) -> None:
    tell(f"{VERSION} {name} begins")
    begun = f"{VERSION} moved={client.upgrader['moved']} value={client.upgrader['value'].decode()}"
    try:
        async for text in client:
            if text == "close":
                await client.close(4000)
                return
            client.upgrader["value"], client.upgrader["version"] = str(text).encode(), 1
            await client.send(f"{begun} {text}")
    finally:
        tell(f"{VERSION} {name} finally")


async def parts(client: HostedWebSocket, _: str) -> None:
    """Says each part of a message as it comes."""
    while True:
        async for part in client.recv_streaming():
            if part:
                await client.send(f"{VERSION} {part}")


async def news(client: HostedWebSocket, _: str) -> None:
    """Reads nothing: whatever anybody else says, it is told."""
    active.add(client)
    try:
        await client.wait_closed()
    finally:
        active.remove(client)
        broadcast(active, "one has left")
        tell(f"{VERSION} news finally")


async def in_replay(client: HostedWebSocket, how: str) -> None:
    first = not client.upgrader["moved"]
    if not first and how in ("raises", "raises-later"):
        if how == "raises-later":
            asyncio.get_running_loop().call_soon(client.transport.abort)
            await client.recv()
        raise RuntimeError("no")
    if not first and how == "hangs":
        await asyncio.sleep(60)
    while not first and how == "waits" and not os.path.exists(os.environ["GO"]):
        await asyncio.sleep(0.01)
    async for text in client:
        await client.send(f"{VERSION} {text}")


async def handle(client: HostedWebSocket) -> None:
    assert client.request
    _, what, name = client.request.path.split("/", 2)
    handlers = {"ws": chat, "echo": echo, "in-replay": in_replay, "parts": parts, "news": news}
    await handlers[what](client, name.partition("?")[0])


def judge(client: HostedWebSocket, request: object, response: object = None) -> object:
    """Refuse an opening handshake that comes again, or answer it in another way."""
    assert client.request
    if client.upgrader["moved"] and client.request.path.endswith("/refuses") and not response:
        return client.respond(403, "no\n")
    if client.upgrader["moved"] and client.request.path.endswith("/differs") and response:
        response.headers["X-Other"] = "1"  # type: ignore[attr-defined]
    return None


async def main() -> None:
    async with upgrader.attach("chat") as instance:
        if VERSION == "bad":

            @instance.verify
            def refuse() -> None:
                raise RuntimeError("this version is bad")

        listener = instance.listener("chat", bind=f"unix:{PATH}")
        options = {"process_request": judge, "process_response": judge}
        async with Adapter(handle, move="close" not in HOW, **options) as adapter:
            instance.protocols(listener, adapter)
            await instance.serve()


if __name__ == "__main__":
    uvloop.run(main()) if "uvloop" in HOW else asyncio.run(main())
