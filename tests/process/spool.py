# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines go through a queue to a thread: `python spool.py '{"face": ..., "bind": ..., "spans": FILE}'`.

A line that was acknowledged lies in the queue for a while before it counts; `count` is how many do.
What is done is kept as spans, which are written to a file at the end only. `flush`: how quiesce goes.
"""

import asyncio
import json
import queue
import sys
import threading
import time
from typing import Any

import upgrader

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
FLUSH: str = OPTIONS.get("flush", "")
SPOOL: queue.Queue[bytes] = queue.Queue()
SPANS: list[str] = []


@upgrader.state("counted")
class Counted:
    lines: int = 0


def work(instance: Any, counted: Counted) -> None:
    while True:
        SPOOL.get()
        with instance.turn():
            time.sleep(0.005)
            counted.lines += 1
            SPANS.append(f"line {counted.lines} of generation {instance.generation}")
        SPOOL.task_done()


def answer(line: bytes, counted: Counted) -> bytes:
    if line == b"count":
        return b"%d\n" % counted.lines
    SPOOL.put(line)
    return b"queued\n"


def declare(instance: Any) -> None:
    instance.state(Counted)

    @instance.quiesce
    def flush() -> None:
        if FLUSH == "fails":
            raise ValueError("no flush")
        if FLUSH == "hangs":
            time.sleep(3600)
        SPOOL.join()

    if OPTIONS["face"] == "aio":

        @instance.resumed
        async def go_on(counted: Counted) -> None:
            await asyncio.sleep(0)
            write_line("served on")

        @instance.replaced
        async def send(counted: Counted) -> None:
            await asyncio.sleep(0)
            write()

    else:
        instance.resumed(lambda: write_line("served on"))
        instance.replaced(write)


def write_line(text: str) -> None:
    with open(OPTIONS["spans"], "a") as file:
        file.write(f"{text}\n")


def write() -> None:
    with open(OPTIONS["spans"], "a") as file:
        file.writelines(f"{span}\n" for span in SPANS)


async def run_aio() -> None:
    async with upgrader.attach("spool") as instance:
        declare(instance)
        listener = instance.listener("spool", bind=OPTIONS["bind"])

        @instance.connections(listener)
        async def talk(peer: Any, counted: Counted) -> None:
            async for line in peer.lines():
                await peer.write(answer(line, counted))

        async def empty(counted: Counted) -> None:
            threading.Thread(target=work, args=(instance, counted), daemon=True).start()

        await instance.serve([empty])


def run_blocking() -> None:
    with upgrader.attach("spool") as instance:
        declare(instance)
        listener = instance.listener("spool", bind=OPTIONS["bind"])
        workers: list[threading.Thread] = []

        @instance.connections(listener)
        def talk(peer: Any, counted: Counted) -> None:
            if not workers:
                workers.append(threading.Thread(target=work, args=(instance, counted), daemon=True))
                workers[0].start()
            for line in peer.lines():
                peer.write(answer(line, counted))

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if OPTIONS["face"] == "aio":
        asyncio.run(run_aio())
    else:
        run_blocking()
