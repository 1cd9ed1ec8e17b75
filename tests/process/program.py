# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service of the process tests: `python program.py '{"face": ..., "bind": ...}'`.

Commands are lines: `add` counts, `echo X`, `big N`, `stream N`, `hold` (busy until released),
`bye`, `fail`, `turn S` (a thread takes a turn of S seconds that counts), `turns S` (three threads
take such turns all the time). Whoever leaves is told goodbye. The same for both faces, and told to break as asked.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import field
from typing import Any

import upgrader

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
VERSION: int = OPTIONS.get("version", 1)
BREAK: str = OPTIONS.get("break", "")
WORK: str = OPTIONS.get("work", "")  # a directory for what the background writes
INSTANCES: list[Any] = []
EXTRA = ["from version 2"] if VERSION >= 2 else []


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(60)


def refuse() -> None:
    raise ValueError("as told")


def leave() -> None:
    os._exit(3)


def break_at(place: str) -> None:
    """Break here if that is what we are told: `<how>-<where>`."""
    how, _, where = BREAK.partition("-")
    if where == place:
        {"die": die, "hang": hang, "refuse": refuse, "leave": leave}[how]()


class Missing:
    """Finds a module not when it is first looked for: its package is being replaced."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            sys.meta_path.remove(self)
            raise ModuleNotFoundError(name)


if VERSION == 1:

    @upgrader.state("counters", version=1)
    class Counters:
        added: int = 0
        ticks: int = 0
        turns: int = 0

        def __post_init__(self) -> None:
            if self.added:
                break_at("state")

else:

    @upgrader.state("counters", version=VERSION, readable_from=OPTIONS.get("readable_from", 1))
    class Counters:  # type: ignore[no-redef]
        added: int = 0
        ticks: int = 0
        turns: int = 0
        extra: list[str] = upgrader.since(2, default_factory=lambda: [*EXTRA])

        def __post_init__(self) -> None:
            if self.added:
                break_at("state")


@upgrader.state("session")
class Session:
    added: int = 0
    sent: int = 0
    streaming: int = 0
    odd: Any = None
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.added:
            break_at("session")


def pattern(size: int) -> bytes:
    """Bytes in which a loss, a repetition or a swap shows."""
    return b"".join(b"%08x" % number for number in range(size // 8))


def answer(line: bytes, counters: Counters, session: Session) -> bytes:
    command, _, argument = line.partition(b" ")
    if command == b"add":
        counters.added += 1
        session.added += 1
        return b"%d %d\n" % (counters.added, session.added)
    if command == b"big":
        return pattern(int(argument)) + b"\n"
    if command == b"odd":
        session.odd = object()
        return b"odd\n"
    if command == b"work":
        return b"%d %d\n" % (counters.ticks, counters.turns)
    if command == b"turn":
        threading.Thread(target=turn_long, args=(float(argument), counters), daemon=True).start()
        return b"begun\n"
    if command == b"turns":
        for _ in range(3):
            Busy(float(argument)).start()
        return b"begun\n"
    if command == b"fail":
        raise RuntimeError("told to fail")
    return argument + b"\n"


def append(name: str) -> None:
    with open(f"{WORK}/{name}", "a") as file:
        file.write(f"{os.getpid()}\n")


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold a lock that two processes cannot hold; says so in a file if another one has it."""
    with open(f"{WORK}/{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            append("overlap")
        yield


def turn_often(instance: Any, counters: Counters) -> None:
    while True:
        with instance.turn(), alone("turns"):
            counters.turns += 1
            time.sleep(0.002)  # in the middle: the count and the file must not come apart
            append("turns")


class Busy(threading.Thread):
    """Takes one turn after the other, each of about so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds

    def run(self) -> None:
        while True:
            with INSTANCES[0].turn():
                time.sleep(self.seconds * random.uniform(0.5, 1.5))


def turn_long(seconds: float, counters: Counters) -> None:
    assert INSTANCES
    with INSTANCES[0].turn():
        time.sleep(seconds)
        counters.turns += 1


def spawn(instance: Any, counters: Counters) -> None:
    threading.Thread(target=turn_often, args=(instance, counters), daemon=True).start()


async def tick(counters: Counters) -> None:
    with alone("ticks"):
        while True:
            counters.ticks += 1
            append("ticks")
            await asyncio.sleep(0.002)


async def failing() -> None:
    while not os.path.exists(f"{WORK}/now"):
        await asyncio.sleep(0.01)
    raise RuntimeError("background task told to fail")


def declare(instance: Any) -> tuple[list[Any], dict[str, Any]]:
    INSTANCES.append(instance)
    instance.state(Counters)
    for name in OPTIONS.get("drop", []):
        instance.drop(name)
    doors = [] if OPTIONS.get("no_door") else [instance.listener("chat", bind=OPTIONS["bind"])]

    @instance.verify
    def check(counters: Counters) -> None:
        break_at("verify")

    return doors, {} if OPTIONS.get("no_session") else {"state": Session}


async def run_aio() -> None:
    async with upgrader.attach("chat", version=str(VERSION)) as instance:
        break_at("attach")
        doors, session = declare(instance)

        async def talk(peer: Any, counters: Counters) -> None:
            time.sleep(OPTIONS.get("slow", 0))
            state = peer.state or Session()
            try:
                while state.sent < state.streaming:
                    state.sent += 1
                    async with peer.safe():
                        await peer.write(b"chunk %d\n" % state.sent)
                        await asyncio.sleep(0.001)
                async for line in peer.lines(limit=1 << 20):
                    if line.startswith(b"hold"):
                        await peer.write(b"holding\n")
                        await asyncio.sleep(3600)
                    if line.startswith(b"stream"):
                        state.sent, state.streaming = 0, int(line.split()[1])
                        while state.sent < state.streaming:
                            state.sent += 1
                            async with peer.safe():
                                await peer.write(b"chunk %d\n" % state.sent)
                                await asyncio.sleep(0.001)
                        continue
                    if line.startswith(b"all"):
                        for other in instance.peers:
                            await other.write(answer(line, counters, state))
                        continue
                    await asyncio.sleep(0.001)  # in the middle of a message
                    reply = answer(line, counters, state)
                    await asyncio.sleep(0.001)
                    await peer.write(reply)
                    if line == b"bye":
                        return
            finally:
                await peer.write(b"goodbye\n")

        for door in doors:
            instance.connections(door, **session)(talk)
        tasks: list[Any] = []
        if WORK:
            tasks.append(tick)

            async def threads(counters: Counters) -> None:
                spawn(instance, counters)

            tasks.append(threads)
        if OPTIONS.get("fails"):
            tasks.append(failing)
        await instance.serve(tasks)


def run_blocking() -> None:
    with upgrader.attach("chat", version=str(VERSION)) as instance:
        break_at("attach")
        doors, session = declare(instance)
        peers: list[Any] = []
        started: list[bool] = []

        def talk(peer: Any, counters: Counters) -> None:
            time.sleep(OPTIONS.get("slow", 0))
            if WORK and not started:
                started.append(True)
                spawn(instance, counters)
            if peer not in peers:
                peers.append(peer)
            for line in peer.lines(limit=1 << 20):
                if line == b"hold":
                    peer.write(b"holding\n")
                    hang()
                if line.startswith(b"all"):
                    for other in peers:
                        other.write(answer(line, counters, peer.state or Session()))
                    continue
                peer.write(answer(line, counters, peer.state or Session()))
                if line == b"bye":
                    peer.write(b"goodbye\n")
                    peer.close()

        for door in doors:
            instance.connections(door, **session)(talk)
        for _ in instance.serve():
            pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    break_at("start")
    if "missing" in OPTIONS:
        sys.meta_path.insert(0, Missing(OPTIONS["missing"]))
    if OPTIONS["face"] == "aio":
        asyncio.run(run_aio())
    else:
        run_blocking()
