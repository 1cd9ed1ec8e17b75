# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chat, as FastAPI's tutorial on WebSockets has it (https://fastapi.tiangolo.com/advanced/websockets/), and
handlers that fail in a replay in all ways; `/plain` is a request without a WebSocket."""

import asyncio
import os
import sys
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from upgrader.aio.instance import attached

VERSION = os.environ["VERSION"]

app = FastAPI()

if VERSION == "bad":

    def refuse() -> None:
        raise RuntimeError("this version is bad")

    attached.get().verify(refuse)


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


class ConnectionManager:
    def __init__(self) -> None:
        self.active: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active.remove(websocket)

    async def broadcast(self, message: str) -> None:
        for connection in list(self.active):
            await connection.send_text(message)


manager = ConnectionManager()


@app.websocket("/ws/{name}")
async def chat(websocket: WebSocket, name: str) -> None:
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.broadcast(f"{VERSION} {name}: {data}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.broadcast(f"{name} left")


@app.get("/plain")
async def plain() -> str:
    return VERSION


@app.websocket("/echo/{name}")
async def echo(websocket: WebSocket, name: str) -> None:
    """What a handler knows of a move, and what it leaves for the next one."""
    extension: dict[str, Any] = websocket.scope["extensions"].get("upgrader", {})
    begun = f"{VERSION} moved={extension.get('moved')} value={extension.get('value', b'').decode()}"
    tell(f"{VERSION} {name} begins")
    await websocket.accept(subprotocol="b" if "b" in websocket.scope["subprotocols"] else None)
    try:
        while True:
            text = await websocket.receive_text()
            if text == "close":
                await websocket.close(4000)
                return
            if text == "slow":
                while not os.path.exists(os.environ["GO"]):
                    await asyncio.sleep(0.01)
            if extension:
                extension["value"], extension["version"] = text.encode(), 1
            await websocket.send_text(f"{begun} {text}")
    except WebSocketDisconnect as error:
        tell(f"{name} disconnected {error.code}")
    finally:
        tell(f"{VERSION} {name} finally")


@app.websocket("/in-replay/{how}")
async def in_replay(websocket: WebSocket, how: str) -> None:
    """Goes well the first time."""
    first = not websocket.scope["extensions"].get("upgrader", {}).get("moved")
    if not first and how == "raises":
        raise RuntimeError("no")
    if not first and how == "dies":
        os._exit(1)
    if not first and how == "hangs":
        await asyncio.sleep(60)
    if not first and how == "refuses":
        tell("refused")
        await websocket.close()
        return
    if not first and how == "differs":
        await websocket.accept(headers=[(b"x-other", b"1")])
    else:
        await websocket.accept()
    if not first and how == "raises-later":
        raise RuntimeError("no")
    while True:
        await websocket.send_text(f"{VERSION} {await websocket.receive_text()}")


@app.websocket("/news")
async def news(websocket: WebSocket) -> None:
    """Passes on what a broker publishes, from the beginning of the handler on."""
    reader, writer = await asyncio.open_unix_connection(os.environ["BROKER"])
    await websocket.accept()

    async def pass_on() -> None:
        async for line in reader:
            await websocket.send_text(line.decode().strip())

    passing = asyncio.create_task(pass_on())
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        passing.cancel()
        writer.close()
