# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs do besides asking for the next message: `python rude.py DIRECTORY [WAY]`, at
DIRECTORY/socket.

`later` is answered, and counted by a task that the answer does not wait for.
`count` asks how many were. `patient` waits for the next line for no time at all, and `long` for a
shorter one than comes: either counts, and answers once DIRECTORY/go exists. A datagram to DIRECTORY/box is
counted as well; the WAY of that is a `reader`, a `transport`, or the transport of a `copy`.
"""

import asyncio
import sys
from pathlib import Path

import upgrader

DIRECTORY = Path(sys.argv[1])
WAY = "".join(sys.argv[2:])


@upgrader.state("counted")
class Counted:
    number: int = 0


async def main() -> None:
    async with upgrader.attach("rude") as instance:
        instance.state(Counted)
        door = instance.listener("rude", bind=f"unix:{DIRECTORY}/socket")
        box = instance.datagrams("box", bind=f"unix:{DIRECTORY}/box")

        async def go_on(peer: upgrader.Peer[None], counted: Counted) -> None:
            counted.number += 1
            while not (DIRECTORY / "go").exists():
                await asyncio.sleep(0.01)
            await peer.write(b"%d\n" % counted.number)

        async def count(counted: Counted) -> None:
            async with instance.turn():
                await asyncio.sleep(0.002)
                counted.number += 1

        started = set[asyncio.Task[None]]()

        @instance.connections(door)
        async def talk(peer: upgrader.Peer[None], counted: Counted) -> None:
            async for line in peer.lines():
                match line:
                    case b"later":
                        task = asyncio.create_task(count(counted))
                        started.add(task)
                        task.add_done_callback(started.discard)
                        await peer.write(b"OK\n")
                    case b"count":
                        await peer.write(b"%d\n" % counted.number)
                    case b"patient":
                        try:
                            async with asyncio.timeout(0):
                                async for _ in peer.lines():
                                    pass
                        except TimeoutError:
                            await go_on(peer, counted)
                    case b"long":
                        try:
                            async for _ in peer.lines(limit=1):
                                pass
                        except upgrader.UpgradeError:
                            await go_on(peer, counted)

        async def receive(counted: Counted) -> None:
            loop = asyncio.get_running_loop()

            def received() -> None:
                box.recv()
                counted.number += 1

            class Receiver(asyncio.DatagramProtocol):
                def datagram_received(self, data: bytes, address: object) -> None:
                    counted.number += 1

            if WAY == "reader":
                loop.add_reader(box, received)
                return
            sock = box.socket.dup() if WAY == "copy" else box.socket
            await loop.create_datagram_endpoint(Receiver, sock=sock)

        await instance.serve(tasks=[receive] if WAY else [])


asyncio.run(main())
