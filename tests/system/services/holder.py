# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines and counts them; MODE says in which way this version of it is a bad one. With SAYS
it writes a status text of its own, twice a second."""

import asyncio
import logging
import os
import socket
import sys
import time

import upgrader

MODE = os.environ.get("MODE", "good")
VERSION = 1 if MODE == "unreadable" else 2
NOTIFY = os.environ.get("NOTIFY_SOCKET", "")
BIND = os.environ.get("BIND") or f"127.0.0.1:{os.environ['PORT']}"


@upgrader.state("counters", version=VERSION)
class Counters:
    total: int = 0


@upgrader.state("session")
class Session:
    count: int = 0


async def main() -> None:
    async with upgrader.attach("holder", version=str(VERSION)) as instance:
        instance.state(Counters)
        door = instance.listener("door", bind=BIND)

        @instance.connections(door, state=Session, drains="DRAINS" in os.environ)
        async def answer(peer: upgrader.Peer[Session], counters: Counters) -> None:
            try:
                async for line in peer.lines():
                    match line.split():
                        case [b"add"]:
                            peer.state.count += 1
                            counters.total += 1
                            told = (peer.state.count, counters.total, instance.generation)
                            await peer.write(b"%d %d %d\n" % told)
                        case [b"big", size]:
                            await peer.write(b"x" * int(size) + b"\n")
                        case [b"busy", seconds]:
                            await asyncio.sleep(float(seconds))
                            await peer.write(b"done\n")
                        case [b"until", path]:
                            while not os.path.exists(path):
                                await asyncio.sleep(0.01)
                            await peer.write(b"done\n")
                        case [b"block", seconds]:
                            time.sleep(float(seconds))
                            await peer.write(b"done\n")
            finally:
                await peer.write(b"goodbye\n")

        if MODE == "lingering":

            @instance.verify
            async def linger(counters: Counters) -> None:
                with open(os.environ["MARK"], "w"):  # says: loaded, and not committed
                    await asyncio.sleep(3600)

        if MODE == "slow":

            @instance.verify
            async def wait(counters: Counters) -> None:
                with open(os.environ["MARK"], "w"):  # says: loaded, and not committed
                    while not os.path.exists(os.environ["SLOW"]):
                        await asyncio.sleep(0.01)

        if MODE == "refusing":

            @instance.verify
            def refuse(counters: Counters) -> None:
                raise ValueError("not with me")

        @instance.reload
        def reloaded(counters: Counters) -> None:
            print("asked to reload", flush=True)

        async def crash(counters: Counters) -> None:
            await asyncio.sleep(0.5)  # the source has gone: only its insurance is left
            if not os.path.exists(os.environ["MARK"]):  # once
                with open(os.environ["MARK"], "w"):
                    os._exit(1)

        async def say(counters: Counters) -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.connect(NOTIFY.replace("@", "\0", 1))
                while True:
                    notify.send(b"STATUS=%d messages so far" % counters.total)
                    await asyncio.sleep(0.5)

        tasks = {"crash": crash} if MODE == "crashing" else {}
        tasks |= {"say": say} if "SAYS" in os.environ else {}
        await instance.serve(list(tasks.values()))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    if MODE == "exit":
        sys.exit("this version ends at once")
    if MODE == "hang":
        time.sleep(3600)
    asyncio.run(main())
