# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines and counts them, with what version 0.1.0 of the library has; MODE says in which way
this version of it is a bad one."""

import asyncio
import os
import time

import upgrader

MODE = os.environ.get("MODE", "good")


@upgrader.state("counters")
class Counters:
    total: int = 0


@upgrader.state("session")
class Session:
    count: int = 0


async def main() -> None:
    async with upgrader.attach("crossing") as instance:
        instance.state(Counters)
        listener = instance.listener("door", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(listener, state=Session)
        async def answer(peer: upgrader.Peer[Session], counters: Counters) -> None:
            async for _ in peer.lines():
                peer.state.count += 1
                counters.total += 1
                told = (peer.state.count, counters.total, instance.generation)
                await peer.write(b"%d %d %d\n" % told)

        if MODE == "refusing":

            @instance.verify
            def refuse(counters: Counters) -> None:
                raise ValueError("not with me")

        await instance.serve()


if MODE == "hang":
    time.sleep(3600)
asyncio.run(main())
