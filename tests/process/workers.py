# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines, and has a worker process: `workers.py FACE METHOD PATH`.

`worker` answers its PID, `again` whether it has ended.
"""

import asyncio
import multiprocessing
import sys
import time

import upgrader

FACE, METHOD, PATH = sys.argv[1:4] if len(sys.argv) > 3 else ("", "", "")


def answer(worker: multiprocessing.process.BaseProcess, line: bytes) -> bytes:
    if line == b"worker":
        return b"%d\n" % (worker.pid or 0)
    worker.join(10)
    return b"%d\n" % (worker.exitcode or 0)


def make() -> multiprocessing.process.BaseProcess:
    worker = multiprocessing.get_context(METHOD).Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()  # type: ignore[attr-defined]
    return worker


async def main() -> None:
    async with upgrader.attach("workers") as instance:

        @instance.connections(instance.listener("door", bind=f"unix:{PATH}"))
        async def serve(peer: upgrader.Peer[None]) -> None:
            worker = make()
            async for line in peer.lines():
                await peer.write(answer(worker, line))

        await instance.serve()


def blocking() -> None:
    with upgrader.attach("workers") as instance:
        workers: list[multiprocessing.process.BaseProcess] = []

        @instance.connections(instance.listener("door", bind=f"unix:{PATH}"))
        def serve(peer: upgrader.blocking.Peer[None]) -> None:
            for line in peer.lines():
                workers[:] = workers or [make()]
                peer.write(answer(workers[0], line))

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if FACE == "aio":
        asyncio.run(main())
    else:
        blocking()
