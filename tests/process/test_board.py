# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checker for a service with pipelining, subscribers and times to live, through upgrades of all modes."""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import DEADLINE
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("board.py")
PIPELINED = 20  # commands that are on their way at once
SECONDS = 0.5  # that a value lives
PATIENCE = 20.0  # seconds for whatever is waited for


@dataclass
class Checker:
    """All clients of one service; each raises what it finds wrong."""

    path: Path
    subscribers: int
    idle: int  # connections that say nothing until the end
    rate: int  # news a second
    over: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)
    published: int = 0
    checked: int = 0  # values that had lived for long enough

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        self.writers.append(writer)
        return reader, writer

    async def ask(self, reader: Any, writer: Any, *commands: str) -> list[str]:
        """Send all commands at once; returns the answers."""
        writer.write("".join(f"{command}\n" for command in commands).encode())
        async with asyncio.timeout(PATIENCE):
            lines = [await reader.readline() for _ in commands]
        assert all(line.endswith(b"\n") for line in lines), "the connection was closed"
        return [line.decode().strip() for line in lines]

    async def write(self, name: str, how: str) -> None:
        """Pipelines writes; what was acknowledged has to be there for ever."""
        reader, writer = await self.connect()
        number = 0
        while not self.over.is_set():
            keys = [f"{name}-{number + offset}" for offset in range(PIPELINED)]
            number += PIPELINED
            answers = await self.ask(reader, writer, *(f"{how} {key} v{key}" for key in keys))
            assert ["OK"] * PIPELINED == answers
            self.acknowledged.update((key, f"v{key}") for key in keys)
            (found,) = await self.ask(reader, writer, f"get {keys[0]}")
            assert found == f"v{keys[0]}"
            await asyncio.sleep(0.02)

    async def let_live(self) -> None:
        """Sets values that live for a while: they are there before, and gone after it."""
        reader, writer = await self.connect()
        number = 0
        while not self.over.is_set():
            number += 1
            key, began = f"ttl-{number}", time.time()
            ok, found = await self.ask(reader, writer, f"ttl {key} here {SECONDS}", f"get {key}")
            assert ok == "OK"
            assert found == "here" or time.time() - began > SECONDS
            await asyncio.sleep(SECONDS)
            assert ["nil"] == await self.ask(reader, writer, f"get {key}")
            self.checked += 1

    async def publish(self, receivers: int) -> None:
        """Publishes news, several at once; each is told to all subscribers."""
        reader, writer = await self.connect()
        while not self.over.is_set():
            count = max(self.rate // 100, 1)
            texts = [f"publish {self.published + offset + 1}" for offset in range(count)]
            assert [str(receivers)] * count == await self.ask(reader, writer, *texts)
            self.published += count
            await asyncio.sleep(0.01)

    async def subscribe(self, ready: asyncio.Event, pause: float) -> None:
        """Gets every news once and in order, up to the last; `pause`: seconds between two reads."""
        reader, writer = await self.connect()
        assert ["OK"] == await self.ask(reader, writer, "subscribe")
        ready.set()
        expected = 0
        while not self.over.is_set() or expected < self.published:
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(0.2):
                    line = await reader.readline()
            except TimeoutError:
                continue
            expected += 1
            assert f"{expected} {expected}\n".encode() == line

    async def run(self, upgrade: Any) -> None:
        """All of them, while `upgrade` goes on in a thread."""
        ready = [asyncio.Event() for _ in range(self.subscribers + 1)]
        clients = [
            asyncio.create_task(self.subscribe(event, 0.002 if place == 0 else 0.0))
            for place, event in enumerate(ready)
        ]
        for event in ready:
            await asyncio.wait_for(event.wait(), PATIENCE)
        clients += [
            asyncio.create_task(self.publish(len(ready))),
            asyncio.create_task(self.let_live()),
            *(
                asyncio.create_task(self.write(f"{how}{n}", how))
                for how in ("set", "work")
                for n in "12"
            ),
        ]
        silent = [await self.connect() for _ in range(self.idle)]
        upgrading = asyncio.create_task(asyncio.to_thread(upgrade))
        await asyncio.wait([upgrading, *clients], return_when=asyncio.FIRST_COMPLETED)
        self.over.set()
        await upgrading
        await asyncio.gather(*clients)
        for reader, writer in silent:
            assert ["nil"] == await self.ask(reader, writer, "get nothing")
            reader, writer = await self.connect()
        for key, text in self.acknowledged.items():
            assert [text] == await self.ask(reader, writer, f"get {key}")


@pytest.mark.parametrize(
    ("upgrades", "subscribers", "idle", "rate"),
    [(4, 10, 50, 100), pytest.param(30, 10, 500, 1000, marks=pytest.mark.matrix)],
)
def test_nothing_is_lost_doubled_or_reordered(
    upgrades: int, subscribers: int, idle: int, rate: int, tmp_path: Path
) -> None:
    """In live upgrades, downgrades and restarts, one after the other: every write that was acknowledged
    is there, every subscriber has all news in their order, and values live as long as they should."""
    path = tmp_path / "socket"

    def command(version: int) -> list[str]:
        return [sys.executable, str(PROGRAM), str(path), str(version)]

    with Service(timeout=DEADLINE) as service:
        service.start(command(1))

        def upgrade() -> None:
            for number in range(upgrades):
                mode = service.upgrade if number % 3 == 2 else service.live
                mode(command(2 - number % 2))

        async def check() -> Checker:
            checker = Checker(path, subscribers, idle, rate)
            try:
                await checker.run(upgrade)
            finally:
                for writer in checker.writers:
                    writer.close()
            return checker

        checker = asyncio.run(check())
        assert service.status
        assert upgrades + 1 == service.status.generation
        assert checker.acknowledged
        assert checker.published
        assert checker.checked
        print(
            f"{len(checker.acknowledged)} writes, {checker.published} news, {checker.checked} lived"
        )
