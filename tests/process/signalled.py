# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers each line with how often it was asked to reload: `signalled.py FACE PATH [own]`.

`own`: it has a handler of its own for SIGHUP, which counts in steps of 100.
"""

import asyncio
import signal
import sys
from typing import Any

import upgrader

FACE, PATH, *OWN = sys.argv[1:]
counted: list[int] = []


def handle(number: int, frame: object) -> None:
    counted.append(100)


def declare(instance: Any) -> Any:
    @instance.reload
    def reloaded() -> None:
        counted.append(1)

    return instance.connections(instance.listener("lines", bind=f"unix:{PATH}"))


async def main() -> None:
    async with upgrader.attach("signalled") as instance:

        @declare(instance)
        async def answer(peer: upgrader.Peer[None]) -> None:
            async for _ in peer.lines():
                await peer.write(b"%d\n" % sum(counted))

        await instance.serve()


def blocking() -> None:
    with upgrader.attach("signalled") as instance:

        @declare(instance)
        def answer(peer: upgrader.blocking.Peer[None]) -> None:
            for _ in peer.lines():
                peer.write(b"%d\n" % sum(counted))

        for _ in instance.serve():
            pass


if OWN:
    signal.signal(signal.SIGHUP, handle)
if FACE == "aio":
    asyncio.run(main())
else:
    blocking()
