# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes and reads a disk of a storage daemon all the time, with as many requests in flight as there can be,
and compares what it reads: `python disk_user.py '{"path": ..., "bind": ...}'`.

`break`: what its check does; `lie`: it describes another connection than it has. Lines: `figures`, and
`finish`, which is answered once nothing is in flight.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Any

import upgrader
from upgrader.lab.vhost_user import DaemonGone, Operation, VhostUserDisk

OPTIONS: dict[str, Any] = {}
BLOCK, BLOCKS = 4096, 256
SECTORS = BLOCK // 512


def content(tag: int) -> bytes:
    """What the request of this number writes."""
    return hashlib.shake_128(tag.to_bytes(8, "little")).digest(BLOCK)


@upgrader.state("progress")
class Progress:
    """`written`: which request has written a block last. For each upgrade, `moved`: how many were in flight,
    `waiting`: how many of those the daemon had not answered when the new instance looked."""

    asked: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    reconnected: int = 0


class Liar(VhostUserDisk):
    """Says that its connection is another one."""

    def describe(self, fd: int) -> Mapping[str, Any]:
        said = super().describe(fd)
        return {**said, "inode": said["inode"] + 1} if said["part"] == "connection" else said


class Load:
    """One request for a block at a time."""

    def __init__(self, disk: VhostUserDisk, progress: Progress) -> None:
        self.disk, self.progress = disk, progress
        self.busy = {asked.sector // SECTORS for asked in disk.in_flight}
        self.finishing = False
        self.idle = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(disk.fileno(), self.answered)
        self.loop.add_reader(disk.connection, self.lost)
        if progress.asked:
            progress.moved.append(len(disk.in_flight))
            progress.waiting.append(len(disk.in_flight) - self.take())
        self.fill()

    def answered(self) -> None:
        self.take()
        self.fill()

    def take(self) -> int:
        """Look at the answers; returns how many there were."""
        progress = self.progress
        try:
            answers = self.disk.answers()
        except Exception as error:
            progress.wrong.append(repr(error))
            return 0
        for answer in answers:
            block = answer.sector // SECTORS
            self.busy.discard(block)
            progress.answered += 1
            if answer.status:
                progress.wrong.append(f"{answer.tag}: status {answer.status}")
            if answer.operation is Operation.READ and answer.data != content(
                progress.written[block]
            ):
                progress.wrong.append(f"{answer.tag}: block {block}")
        if self.finishing and not self.disk.in_flight:
            self.idle.set()
        return len(answers)

    def fill(self) -> None:
        while self.disk.room and not self.finishing:
            block = random.randrange(BLOCKS)
            if block in self.busy:
                continue
            self.busy.add(block)
            self.progress.asked += 1
            tag = self.progress.asked
            if random.random() < 0.5 or block not in self.progress.written:
                self.progress.written[block] = tag
                self.disk.write(block * SECTORS, content(tag), tag)
            else:
                self.disk.read(block * SECTORS, BLOCK, tag)

    def lost(self) -> None:
        """The daemon has ended."""
        self.loop.remove_reader(self.disk.connection)
        self.reconnect()

    def reconnect(self) -> None:
        try:
            self.disk.reconnect()
        except (OSError, DaemonGone):  # there is none yet, or still the one that ends
            self.loop.call_later(0.01, self.reconnect)
            return
        except Exception as error:
            self.progress.wrong.append(repr(error))
            return
        self.progress.reconnected += 1
        self.loop.add_reader(self.disk.connection, self.lost)


async def main() -> None:
    async with upgrader.attach("disk-user") as instance:
        declared = instance.state(Progress)
        kind = Liar if OPTIONS.get("lie") else VhostUserDisk
        disk = instance.backend("disk", kind(OPTIONS["path"]))
        listener = instance.listener("questions", bind=OPTIONS["bind"])
        loads: list[Load] = []

        @instance.verify
        def check() -> None:
            match OPTIONS.get("break"):
                case "refuse":
                    raise ValueError("as told")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)

        async def talk(peer: Any) -> None:
            async for line in peer.lines():
                if line == b"finish":
                    loads[0].finishing = True
                    loads[0].take()
                    await loads[0].idle.wait()
                    loads[0].take()  # nothing comes a second time
                said = {**asdict(declared.value), "now": len(disk.in_flight)}
                await peer.write(json.dumps(said).encode() + b"\n")

        async def serve() -> None:
            loads.append(Load(disk, declared.value))

        instance.connections(listener)(talk)
        await instance.serve([serve])


if __name__ == "__main__":
    OPTIONS.update(json.loads(sys.argv[1]))
    asyncio.run(main())
