# SPDX-License-Identifier: LGPL-2.1-or-later
"""Publishers and subscribers: `python channels.py FACE PATH`; lines are `subscribe`, `publish X`,
`broadcast SIZE`, and `stick`: then the handler, called anew, waits for something else.

Who has subscribed is known from the state of its connection, and registered by its handler.
"""

import asyncio
import sys
from typing import Any

import upgrader

FACE, PATH = sys.argv[1:]


@upgrader.state("subscription")
class Subscription:
    wanted: bool = False
    stuck: bool = False


subscribers: list[Any] = []


def page(size: bytes) -> bytes:
    return b"x" * int(size) + b"\n"


def wants(peer: Any) -> bool:
    return bool(peer.state.wanted)


async def run_aio() -> None:
    async with upgrader.attach("channels") as instance:
        listener = instance.listener("channels", bind=f"unix:{PATH}")

        @instance.connections(listener, state=Subscription)
        async def talk(peer: upgrader.Peer[Subscription]) -> None:
            if peer.state.stuck:
                await asyncio.sleep(3600)
            if peer.state.wanted:
                await asyncio.sleep(0.01)  # as one that asks somewhere else first
                subscribers.append(peer)
            async for line in peer.lines():
                command, _, text = line.partition(b" ")
                peer.state.stuck = command == b"stick"
                if command == b"subscribe":
                    peer.state.wanted = True
                    subscribers.append(peer)
                    await peer.write(b"subscribed\n")
                    continue
                if command == b"broadcast":
                    missed = instance.peers.broadcast(page(text), to=wants)
                    await peer.write(b"%d of %d\n" % (len(missed), len(instance.peers)))
                    continue
                for other in subscribers:
                    await other.write(text + b"\n")
                await asyncio.sleep(0.005)
                await peer.write(b"%d\n" % len(subscribers))

        await instance.serve()


def run_blocking() -> None:
    with upgrader.attach("channels") as instance:
        listener = instance.listener("channels", bind=f"unix:{PATH}")

        @instance.connections(listener, state=Subscription)
        def talk(peer: Any) -> None:
            if peer.state.wanted and peer not in subscribers:
                subscribers.append(peer)
            for line in peer.lines():
                command, _, text = line.partition(b" ")
                if command == b"subscribe":
                    peer.state.wanted = True
                    subscribers.append(peer)
                    peer.write(b"subscribed\n")
                    continue
                if command == b"broadcast":
                    missed = instance.peers.broadcast(page(text), to=wants)
                    peer.write(b"%d of %d\n" % (len(missed), len(instance.peers)))
                    continue
                for other in subscribers:
                    other.write(text + b"\n")
                peer.write(b"%d\n" % len(subscribers))

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if FACE == "aio":
        asyncio.run(run_aio())
    else:
        run_blocking()
