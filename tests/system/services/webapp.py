# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FastAPI application as people write them: it knows nothing of upgrades."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket
from fastapi.responses import Response, StreamingResponse


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    if os.environ.get("MODE") == "refusing":
        raise RuntimeError("no database")
    print(f"start-up of {os.getpid()}", flush=True)
    yield
    print(f"end of {os.getpid()}", flush=True)


app = FastAPI(lifespan=lifespan, version=os.environ.get("ROUND", "0"))


@app.get("/")
def root() -> dict[str, str]:
    return {"version": app.version}


@app.get("/quick")
async def quick() -> dict[str, str]:
    await asyncio.sleep(0.002)
    return {"version": app.version}


@app.get("/slow")
async def slow() -> dict[str, str]:
    await asyncio.sleep(0.1)
    return {"version": app.version}


@app.get("/stream/{count}")
async def stream(count: int) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(count):
            yield f"{number}\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(lines())


@app.get("/big")
def big() -> Response:
    return Response(bytes(1 << 26))


@app.get("/until-marked")
async def until_marked() -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        yield "begin\n"
        while not os.path.exists(os.environ["MARK"]):
            await asyncio.sleep(0.01)
        yield "end\n"

    return StreamingResponse(lines())


@app.websocket("/ws")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(f"{app.version} {text}")
