# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines and counts them. STEP says where this version of it waits until the file GO is there
(and says by the file MARK that it does), FLAW what is wrong with it."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import upgrader
from upgrader.systemd.notify import Notifier

STEP = os.environ.get("STEP", "")
FLAW = os.environ.get("FLAW", "")
MARK = Path(os.environ["RUNTIME_DIRECTORY"], "mark")
GO = Path(os.environ["RUNTIME_DIRECTORY"], "go")
STARTED_WITH = dict(os.environ)


def waits(step: str) -> bool:
    """Whether this is where it waits, and GO is not there yet."""
    if step != STEP:
        return False
    if not MARK.exists():
        MARK.write_text(step)
    return not GO.exists()


@upgrader.state("counters")
class Counters:
    total: int = 0


@upgrader.state("session")
class Session:
    count: int = 0

    def __post_init__(self) -> None:
        if FLAW == "steady":
            time.sleep(0.05)


async def main() -> None:
    while waits("import"):
        time.sleep(0.005)
    async with upgrader.attach("lively") as instance:
        instance.state(Counters)
        bind = os.environ.get("BIND") or f"127.0.0.1:{os.environ['PORT']}"
        door = instance.listener("gate" if FLAW == "less" else "door", bind=bind)
        if FLAW == "wrong":
            instance.state(Counters)  # declared twice

        @instance.connections(door, state=Session, drains="DRAINS" in os.environ)
        async def answer(peer: upgrader.Peer[Session], counters: Counters) -> None:
            async for line in peer.lines():
                match line.split():
                    case [b"add"]:
                        peer.state.count += 1
                        counters.total += 1
                        told = (peer.state.count, counters.total, instance.generation)
                        await peer.write(b"%d %d %d\n" % told)
                    case [b"busy", seconds]:
                        await asyncio.sleep(float(seconds))
                        await peer.write(b"done\n")
                    case [b"busy-until", path]:
                        while not os.path.exists(path):
                            await asyncio.sleep(0.01)
                        await peer.write(b"done\n")
                    case [b"turn", seconds]:
                        async with instance.turn():
                            await asyncio.sleep(float(seconds))
                            counters.total += 10**6
                        await peer.write(b"done\n")
                    case [b"environment"]:
                        await peer.write(json.dumps(STARTED_WITH).encode() + b"\n")
                    case [b"credential", name]:
                        there = Path(os.environ["CREDENTIALS_DIRECTORY"], name.decode())
                        told = there.read_bytes().strip() if there.exists() else b"missing"
                        await peer.write(told + b"\n")
                    case [b"threads"]:
                        await peer.write(b"%d\n" % len(os.listdir("/proc/self/task")))
                    case [b"replace"]:
                        instance.replace()
                        await peer.write(b"done\n")
                    case [b"quit"]:
                        return

        @instance.verify
        async def check() -> None:
            if FLAW == "fork" and os.fork() == 0:
                time.sleep(60)  # holds whatever it has inherited
                os._exit(0)
            while waits("verify"):
                await asyncio.sleep(0.005)
            if FLAW == "fork":
                sys.exit("ends, and what it has forked does not")
            if FLAW == "slow":
                await asyncio.sleep(0.15)

        @instance.reload
        def reloaded() -> None:
            print("asked to reload", flush=True)

        async def says_that_it_lives() -> None:
            if usec := os.environ.get("WATCHDOG_USEC"):
                notifier = Notifier.from_environment(os.environ)
                while True:
                    notifier.send("WATCHDOG=1")
                    await asyncio.sleep(int(usec) / 3e6)

        async def ends() -> None:
            if FLAW == "slow-stop":
                try:
                    await asyncio.sleep(3600)
                finally:
                    await asyncio.sleep(1)
                    print("has taken its time", flush=True)

        await instance.serve([says_that_it_lives, ends])


if __name__ == "__main__":
    if FLAW == "exit":
        sys.exit("this version ends at once")
    asyncio.run(main())
