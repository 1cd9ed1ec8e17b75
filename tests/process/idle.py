# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many idle connections: `python idle.py FACE LAZY PATH [refuse | small | older]`; a line is answered with how many lines
came on its connection, how many handlers were called in this process, and the generation.

`all` has a line sent to all peers; an empty line is answered with nothing. `refuse`: it does not take
over; `small`: a channel takes what the kernel's least buffer takes;
`older`: as a library that knows no crowds.
"""

import asyncio
import socket
import sys
from typing import Any

import upgrader
from upgrader.protocol import channel, image

FACE, LAZY, PATH, *OPTIONS = sys.argv[1:]


@upgrader.state("idle")
class Lines:
    count: int = 0


seen: set[int] = set()


def answer(instance: Any, peer: Any, line: bytes) -> bytes:
    peer.state.count += 1
    if line == b"all":
        instance.peers.broadcast(b"to all\n")
    return b"%d %d %d\n" % (peer.state.count, len(seen), instance.generation) if line else b""


def verify() -> None:
    if OPTIONS == ["refuse"]:
        raise upgrader.VerifyError("as told")


def small_pair() -> tuple[socket.socket, socket.socket]:
    reader, writer = socket.socketpair()
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return reader, writer


async def run_aio() -> None:
    async with upgrader.attach("idle") as instance:
        listener = instance.listener("idle", bind=f"unix:{PATH}")
        instance.verify(verify)

        @instance.connections(listener, state=Lines, lazy=LAZY == "lazy")
        async def talk(peer: upgrader.Peer[Lines]) -> None:
            seen.add(id(peer))
            async for line in peer.lines():
                await peer.write(answer(instance, peer, line))

        await instance.serve()


def run_blocking() -> None:
    with upgrader.attach("idle") as instance:
        listener = instance.listener("idle", bind=f"unix:{PATH}")
        instance.verify(verify)

        @instance.connections(listener, state=Lines, lazy=LAZY == "lazy")
        def talk(peer: Any) -> None:
            seen.add(id(peer))
            for line in peer.lines():
                peer.write(answer(instance, peer, line))

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if OPTIONS == ["small"]:
        channel.pair = small_pair
    if OPTIONS == ["older"]:
        image.FORMATS = (1, 2, 3)
    if FACE == "aio":
        asyncio.run(run_aio())
    else:
        run_blocking()
