# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys, values with a time to live, and news for subscribers: `python board.py PATH VERSION`.

Commands are lines: `set K V`, `ttl K V SECONDS`, `get K`, `subscribe`, `publish TEXT` (told to how many),
`work K V` (sets within a turn of some milliseconds, of a thread).
"""

import asyncio
import sys
import threading
import time
from dataclasses import dataclass, field

import upgrader

PATH, VERSION = sys.argv[1], int(sys.argv[2])
FOR_EVER = float("inf")


@dataclass
class Entry:
    text: str = ""
    until: float = FOR_EVER  # seconds since the epoch


@upgrader.state("board", version=VERSION, readable_from=1)
class Board:
    entries: dict[str, Entry] = field(default_factory=dict)
    news: int = 0


@upgrader.state("reader")
class Reader:
    subscribed: bool = False


async def main() -> None:
    async with upgrader.attach("board", version=str(VERSION)) as instance:
        instance.state(Board)
        listener = instance.listener("board", bind=f"unix:{PATH}")

        def work(board: Board, key: str, text: str) -> None:
            with instance.turn():
                time.sleep(0.005)
                board.entries[key] = Entry(text)

        @instance.connections(listener, state=Reader)
        async def serve(peer: upgrader.Peer[Reader], board: Board) -> None:
            async for line in peer.lines():
                match line.decode().split():
                    case ["set", key, text]:
                        board.entries[key] = Entry(text)
                        await peer.write(b"OK\n")
                    case ["ttl", key, text, seconds]:
                        board.entries[key] = Entry(text, time.time() + float(seconds))
                        await peer.write(b"OK\n")
                    case ["work", key, text]:
                        done = asyncio.Event()
                        loop = asyncio.get_running_loop()

                        def working(key: str = key, text: str = text) -> None:
                            work(board, key, text)
                            loop.call_soon_threadsafe(done.set)  # noqa: B023

                        threading.Thread(target=working, daemon=True).start()
                        await done.wait()
                        await peer.write(b"OK\n")
                    case ["get", key]:
                        entry = board.entries.get(key, Entry("nil"))
                        text = entry.text if time.time() < entry.until else "nil"
                        await peer.write(f"{text}\n".encode())
                    case ["subscribe"]:
                        peer.state.subscribed = True
                        await peer.write(b"OK\n")
                    case ["publish", text]:
                        board.news += 1
                        to = [each for each in instance.peers if each.state.subscribed]
                        told = f"{board.news} {text}\n".encode()
                        late = instance.peers.broadcast(told, to=lambda each: each.state.subscribed)
                        await peer.write(f"{len(to) - len(late)}\n".encode())

        async def expire(board: Board) -> None:
            while True:
                await asyncio.sleep(0.1)
                now = time.time()
                entries = board.entries.copy()  # at once: threads write, too
                for key in [key for key, entry in entries.items() if entry.until < now]:
                    del board.entries[key]

        await instance.serve([expire])


if __name__ == "__main__":
    asyncio.run(main())
