# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines by a pool of two worker processes, started by METHOD, and by the face FACE.

`pids` are those of the workers, `quit` closes the connection. `start WORD` starts a process and answers its
PID: `plain`, one that is `stubborn` (no SIGTERM), or one that is `kept` in every later instance; `alone` is
one that has a child, and `orphan` one that has left one behind.
"""

import asyncio
import multiprocessing
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import upgrader
from upgrader.protocol.fd import Fd

BIND = os.environ.get("BIND") or f"127.0.0.1:{os.environ['PORT']}"
SCRIPTS = {
    "plain": "exec sleep 600",
    "kept": "exec sleep 600",
    "stubborn": "trap '' TERM; sleep 600; sleep 600",
    "alone": "sleep 600 & wait",
    "orphan": "sleep 600 &",
}


def work() -> int:
    time.sleep(0.05)  # so that the other one gets something
    return os.getpid()


class Service:
    """What both faces do."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        context = multiprocessing.get_context(os.environ.get("METHOD", "fork"))
        self._pool = ProcessPoolExecutor(2, mp_context=context)
        self._started: list[subprocess.Popen[bytes]] = []

    def answer(self, line: bytes) -> bytes:
        match line.decode().split():
            case ["start", word]:
                started = subprocess.Popen(["sh", "-c", SCRIPTS[word]])
                self._started.append(started)
                if word == "kept":
                    with Fd(os.pidfd_open(started.pid)) as pidfd:
                        self._instance.keep("worker", pidfd)
                return b"%d\n" % started.pid
            case ["pids"]:
                found: set[int] = set()
                while len(found) < 2:  # one may be long in starting
                    found |= {each.result() for each in [self._pool.submit(work) for _ in range(8)]}
                return f"{' '.join(map(str, found))}\n".encode()
            case ["passed"]:
                return f"{' '.join(item.name for item in self._instance.passed)}\n".encode()
        return b"%d\n" % self._instance.generation


async def main() -> None:
    async with upgrader.attach("pooled") as instance:
        service = Service(instance)

        @instance.connections(instance.listener("lines", bind=BIND))
        async def serve(peer: upgrader.Peer[None]) -> None:
            async for line in peer.lines():
                if line == b"quit":
                    return
                await peer.write(service.answer(line))

        await instance.serve()


def blocking() -> None:
    with upgrader.attach("pooled") as instance:
        service = Service(instance)

        @instance.connections(instance.listener("lines", bind=BIND))
        def serve(peer: upgrader.blocking.Peer[None]) -> None:
            for line in peer.lines():
                if line == b"quit":
                    peer.close()
                else:
                    peer.write(service.answer(line))

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if os.environ.get("FACE") == "blocking":
        blocking()
    else:
        asyncio.run(main())
