# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chat: handlers with awaits in the middle and a goodbye, a background task, a thread pool."""

import asyncio
import fcntl
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import upgrader

MODE = os.environ.get("MODE", "good")
#: Where the background task says that it has met itself in another process.
TWICE = "/run/chat.twice"


@upgrader.state("room", version=1 if MODE == "unreadable" else 2)
class Room:
    taken: int = 0
    answered: int = 0
    counted: int = 0  # by threads
    ticks: int = 0


@upgrader.state("member")
class Member:
    last: int = 0


async def main() -> None:
    lock = open("/run/chat.lock", "w")  # noqa: SIM115, it is locked for as long as the task runs
    pool = ThreadPoolExecutor(4)
    counting = threading.Lock()

    async with upgrader.attach("chat", version="2") as instance:
        instance.state(Room)
        door = instance.listener("door", bind=f"127.0.0.1:{os.environ['PORT']}")

        def count(room: Room) -> None:
            with instance.turn(), counting:
                room.counted += 1

        @instance.connections(door, state=Member)
        async def talk(peer: upgrader.Peer[Member], room: Room) -> None:
            loop = asyncio.get_running_loop()
            try:
                async for line in peer.lines():
                    if line == b"room":
                        seen = (room.taken, room.answered, room.counted, room.ticks)
                        await peer.write(b"%d %d %d %d\n" % seen)
                        continue
                    number = int(line)
                    room.taken += 1
                    await asyncio.sleep(0.002 * (number % 5))
                    await loop.run_in_executor(pool, count, room)
                    peer.state.last = number
                    room.answered += 1
                    await peer.write(b"%d\n" % number)
            finally:
                await peer.write(b"goodbye\n")

        async def tick(room: Room) -> None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with open(TWICE, "a") as file:
                    file.write("twice\n")
            try:
                while True:
                    await asyncio.sleep(0.005)
                    room.ticks += 1
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

        if MODE == "refusing":

            @instance.verify
            def refuse(room: Room) -> None:
                raise ValueError("not with me")

        await instance.serve(tasks=[tick])


if __name__ == "__main__":
    if MODE == "exit":
        sys.exit("this version ends at once")
    asyncio.run(main())
