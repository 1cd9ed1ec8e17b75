# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FastAPI application with all that lasts: uploads, downloads, an event stream, WebSockets, tasks in
the background, a pool of processes and a database; it knows nothing of upgrades."""

import asyncio
import hashlib
import os
import random
import signal
import sqlite3
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

PIECE = 1 << 16
EVENTS = 40  # of one answer; a client asks for more
#: At a stop, systemd sends SIGTERM to all processes: the workers end when there is nothing left to do.
POOL = ProcessPoolExecutor(2, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_IGN))


def write(kind: str, name: str) -> None:
    with sqlite3.connect(os.environ["DATABASE"], timeout=30) as database:
        database.execute("insert into done values (?, ?)", (kind, name))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with sqlite3.connect(os.environ["DATABASE"], timeout=30) as database:
        database.execute("create table if not exists done (kind, name)")
    yield
    POOL.shutdown()


app = FastAPI(lifespan=lifespan, version=os.environ.get("ROUND", "0"))


@app.get("/rows/{kind}")
def rows(kind: str) -> list[str]:
    with sqlite3.connect(os.environ["DATABASE"], timeout=30) as database:
        return [name for (name,) in database.execute("select name from done where kind=?", (kind,))]


@app.post("/upload/{name}")
async def upload(name: str, request: Request) -> dict[str, str]:
    digest = hashlib.sha256()
    async for piece in request.stream():
        digest.update(piece)
    await run_in_threadpool(write, "upload", name)
    return {"sha256": digest.hexdigest()}


@app.get("/download/{seed}/{pieces}")
async def download(seed: int, pieces: int) -> StreamingResponse:
    piece = random.Random(seed).randbytes(PIECE)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield piece

    return StreamingResponse(body(), headers={"Content-Length": str(pieces * PIECE)})


@app.get("/events")
async def events(request: Request) -> StreamingResponse:
    last = int(request.headers.get("Last-Event-ID", "0"))

    async def stream() -> AsyncIterator[str]:
        for number in range(last + 1, last + 1 + EVENTS):
            yield f"id: {number}\ndata: {app.version}\n\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(stream(), media_type="text/event-stream")


@app.post("/later/{name}")
def later(name: str, background: BackgroundTasks) -> dict[str, str]:
    background.add_task(write, "later", name)
    return {"will": "be done"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@app.get("/hash/{text}")
async def pooled(text: str) -> dict[str, str]:
    loop = asyncio.get_running_loop()
    return {"sha256": await loop.run_in_executor(POOL, digest, text)}


@app.websocket("/ws")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)
