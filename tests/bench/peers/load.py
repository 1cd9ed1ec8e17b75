# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one load client of all servers: a process that asks until its standard input ends, and then prints
what came of it as one JSON object (`Seen`).

Latencies are counted from when a request was due; times are of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time

import msgspec

RATE = 250.0  # new connections a second
KEPT = 10  # connections that are kept alive
KEPT_RATE = 20.0  # requests a second on each
STREAMS = 8
PATIENCE = 5.0  # seconds for an answer, or for the next chunk


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """One request: when it was due, how many seconds it took, and which version answered; why there
    was no answer."""

    due: float
    took: float
    version: str = ""
    failed: str = ""
    kept: bool = False


class Seen(msgspec.Struct, frozen=True):
    """What all clients saw. `closed`: times at which a kept connection was closed while nothing was
    asked on it; `broken`: times at which a stream ended."""

    answers: list[Answer]
    closed: list[float]
    broken: list[float]


class Load:
    """All clients of one run."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[Answer] = []
        self.closed: list[float] = []
        self.broken: list[float] = []
        self.over = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def new(self, due: float) -> None:
        """One request on a connection of its own."""
        writer = None
        try:
            async with asyncio.timeout_at(due + PATIENCE):
                reader, writer = await self.connect()
                writer.write(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                version = await answer(reader)
            self.answers.append(Answer(due, time.monotonic() - due, version))
        except (OSError, ValueError, EOFError, TimeoutError) as error:
            self.answers.append(Answer(due, time.monotonic() - due, failed=repr(error)))
        finally:
            if writer:
                writer.close()

    async def kept(self, number: int) -> None:
        """Requests on one connection; a new one only if that was closed."""
        due = time.monotonic() + number / KEPT / KEPT_RATE
        reader = writer = None
        while not self.over:
            await asyncio.sleep(due - time.monotonic())
            try:
                async with asyncio.timeout_at(due + PATIENCE):
                    if writer and reader and reader.at_eof():
                        self.closed.append(time.monotonic())
                        writer.close()
                        writer = None
                    if writer is None or reader is None:
                        reader, writer = await self.connect()
                    writer.write(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
                    version = await answer(reader)
                self.answers.append(Answer(due, time.monotonic() - due, version, kept=True))
            except (OSError, ValueError, EOFError, TimeoutError) as error:
                took = time.monotonic() - due
                self.answers.append(Answer(due, took, failed=repr(error), kept=True))
                if writer:
                    writer.close()
                writer = None
            due = max(due + 1 / KEPT_RATE, time.monotonic() - 1)
        if writer:
            writer.close()

    async def stream(self) -> None:
        """One stream after the other: the next one if that broke."""
        while not self.over:
            writer = None
            try:
                reader, writer = await self.connect()
                writer.write(b"GET /stream HTTP/1.1\r\nHost: bench\r\n\r\n")
                while not self.over:
                    async with asyncio.timeout(PATIENCE):
                        if not await reader.read(65536):
                            raise EOFError
            except (OSError, EOFError, TimeoutError):
                self.broken.append(time.monotonic())
                await asyncio.sleep(0.1)
            finally:
                if writer:
                    writer.close()

    async def run(self) -> None:
        """All clients, until standard input ends."""
        told, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), told.set)
        lasting = [loop.create_task(self.stream()) for _ in range(STREAMS)]
        lasting += [loop.create_task(self.kept(number)) for number in range(KEPT)]
        due = time.monotonic()
        while not told.is_set():
            while due <= time.monotonic():
                task = loop.create_task(self.new(due))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                due += 1 / RATE
            await asyncio.sleep(max(due - time.monotonic(), 0))
        self.over = True
        await asyncio.gather(*lasting, *self.tasks)


async def answer(reader: asyncio.StreamReader) -> str:
    """The version in an answer; raises EOFError or ValueError."""
    head = await reader.readuntil(b"\r\n\r\n")
    status, *lines = head.lower().split(b"\r\n")
    if b" 200 " not in status:
        raise ValueError(status.decode())
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    return (await reader.readexactly(length)).decode().strip()


def main() -> None:
    """Run the process."""
    # Clients are elsewhere: what an upgrade takes of this machine is for the server to notice.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()
    load = Load(int(sys.argv[1]))
    asyncio.run(load.run())
    sys.stdout.buffer.write(msgspec.json.encode(Seen(load.answers, load.closed, load.broken)))


if __name__ == "__main__":
    main()
