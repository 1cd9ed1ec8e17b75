# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients of cache.py that keep books of all that it must know and say; each raises what is wrong."""

import asyncio
import contextlib
import itertools
import random
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tests.support import SETTLE
from tests.system.serving import Service, network_of

PATIENCE = SETTLE * 2  # seconds that a client waits for its next line
WINDOW = 40  # commands that a writer has on their way at once
TTLS = (200, 1000, 3000)  # milliseconds
LATE = 20.0  # seconds; as long as a pause at the most, or as a busy machine has the service wait
BEHIND = 20_000  # messages that the slow reader may be behind
BIG, MANY = 40_000, 200  # bytes of a long value, and how often it is asked for at once
HELD_BACK = 3  # bytes of the last command that are sent with the next one


@dataclass(frozen=True)
class Size:
    """How much there is to do."""

    idle: int  # subscribers that hear something once a second
    rate: int  # messages a second for the two others
    bytes: int  # of each message
    writers: int = 3


class _Line:
    """A connection of which one reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def hear(self) -> str:
        async with asyncio.timeout(PATIENCE):
            line = await self._reader.readline()
        assert line.endswith(b"\n"), f"the connection has ended after {line!r}"
        return line[:-1].decode()

    async def ended(self) -> bool:
        """Whether there is nothing more to hear; the connection is closed then."""
        async with asyncio.timeout(PATIENCE):
            more = await self._reader.read(1)
        self.writer.close()
        return not more

    async def ask(self, command: str) -> str:
        self.writer.write(f"{command}\n".encode())
        return await self.hear()


class _Pipeline:
    """Commands that do not wait for the answers to those before; half a command is always under way."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._unsent = b""
        self._expected: deque[tuple[str, str]] = deque()  # commands and their answers
        self._over = False
        self.acknowledged = 0

    @property
    def outstanding(self) -> int:
        return len(self._expected)

    def say(self, command: str, expected: str) -> None:
        self._unsent += f"{command}\n".encode()
        self._expected.append((command, expected))

    async def flush(self, *, whole: bool = False) -> None:
        end = len(self._unsent) - (0 if whole else HELD_BACK)
        self._line.writer.write(self._unsent[:end])
        self._unsent = self._unsent[end:]
        await self._line.writer.drain()

    async def end(self) -> None:
        """Send all; `listen` returns as soon as all is answered."""
        self._over = True
        self.say("PING", "PONG")
        await self.flush(whole=True)

    async def listen(self) -> None:
        """Compare each answer with what it must be."""
        while self._expected or not self._over:
            said = await self._line.hear()
            command, expected = self._expected.popleft()
            assert expected == said, f"{said!r} and not {expected!r} to {command!r}"
            self.acknowledged += 1


@dataclass
class Checker:
    """All clients of one service, and their books."""

    service: Service
    size: Size
    over: bool = False
    values: dict[str, str] = field(default_factory=dict)  # of keys that live for ever
    mortal: dict[str, tuple[float, float]] = field(default_factory=dict)  # due: at least, at most
    published: Counter[str] = field(default_factory=Counter)
    heard: Counter[str] = field(default_factory=Counter)
    pipelines: list[_Pipeline] = field(default_factory=list)
    hurried: int = 0
    latest: float = 0.0  # seconds that a key has lived too long
    _last_due: float = 0.0
    _opened: list[_Line] = field(default_factory=list)

    async def run(self, work: Callable[[], None]) -> None:
        """Do `work` in a thread while all of them are busy, then balance the books."""
        try:
            subscribers = [await self._subscribe("busy") for _ in "ab"]
            slow = await self._subscribe("busy", buffer=1 << 16)
            idle = [await self._subscribe("quiet") for _ in range(self.size.idle)]
            dying = await self._subscribe("expired")
            async with asyncio.TaskGroup() as group:
                for line in subscribers:
                    group.create_task(self._follow(line, "busy", self._is_news))
                group.create_task(self._follow(slow, "busy", self._is_news, behind=True))
                for line in idle:
                    group.create_task(self._follow(line, "quiet", self._is_news))
                group.create_task(self._follow(dying, "expired", self._has_expired))
                group.create_task(self._publish({"busy": len(subscribers) + 1, "quiet": len(idle)}))
                group.create_task(self._let_die())
                group.create_task(self._hurry())
                group.create_task(self._gorge())
                for number in range(self.size.writers):
                    group.create_task(self._write(f"w{number}"))
                await asyncio.to_thread(work)
                self.over = True
            await self._balance()
        finally:
            self.over = True
            for line in self._opened:
                line.writer.close()

    async def _connect(self, buffer: int = 0) -> _Line:
        with network_of(self.service.machine):
            sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect(("127.0.0.1", self.service.port))
        line = _Line(*await asyncio.open_connection(sock=sock, limit=1 << 16))
        self._opened.append(line)
        return line

    # Subscribers

    async def _subscribe(self, channel: str, buffer: int = 0) -> _Line:
        line = await self._connect(buffer)
        assert "OK" == await line.ask(f"SUBSCRIBE {channel}")
        return line

    async def _follow(
        self,
        line: _Line,
        channel: str,
        check: Callable[[int, list[str]], None],
        *,
        behind: bool = False,
    ) -> None:
        """Hear each message once and in order up to the last; `behind`: only a quarter of them until
        then, so that the rest has to wait in the service."""
        for number in itertools.count(1):
            while behind and self._waits(number, self.published[channel]):
                await asyncio.sleep(0.02)
            name, counted, *text = (await line.hear()).split()
            assert (channel, str(number)) == (name, counted), f"{name} {counted} is not {number}"
            self.heard["slow" if behind else channel] += 1
            if text == ["end"]:
                break
            check(number, text)
        assert "PONG" == await line.ask("PING")  # and nothing has been told twice

    def _waits(self, number: int, published: int) -> bool:
        """Whether the slow reader does not ask for that message yet."""
        return not self.over and published < min(number * 4, number + BEHIND)

    def _is_news(self, number: int, text: list[str]) -> None:
        assert str(number) == text[0].split("-")[0]

    def _has_expired(self, _: int, text: list[str]) -> None:
        """A key ends once, in its time: from when it was given, whatever happened since."""
        key, due, now = text[0], float(text[1]), float(text[2])
        earliest, latest = self.mortal.pop(key)
        assert earliest - 1e-5 <= due <= latest + 1e-5, f"{key} is due at another time"
        assert self._last_due <= due <= now, f"{key} has ended too early"
        assert now - due < LATE, f"{key} has ended {now - due:.1f} s too late"
        self._last_due = due
        self.latest = max(self.latest, now - due)

    # Those who say something

    @contextlib.asynccontextmanager
    async def _pipeline(self) -> AsyncIterator[_Pipeline]:
        pipeline = _Pipeline(await self._connect())
        self.pipelines.append(pipeline)
        async with asyncio.TaskGroup() as group:
            group.create_task(pipeline.listen())
            yield pipeline
            await pipeline.end()

    async def _publish(self, receivers: dict[str, int]) -> None:
        """So many messages a second, whether they are answered or not."""
        begun = time.monotonic()
        fill = "x" * self.size.bytes
        async with self._pipeline() as pipeline:

            def say(channel: str) -> None:
                self.published[channel] += 1
                text = f"{self.published[channel]}-{fill}"
                pipeline.say(f"PUBLISH {channel} {text}", str(receivers[channel]))

            while not self.over:
                passed = time.monotonic() - begun
                while self.published["busy"] < passed * self.size.rate:
                    say("busy")
                if self.published["quiet"] < passed:
                    say("quiet")
                await pipeline.flush()
                await asyncio.sleep(0.01)
            for channel, count in receivers.items():
                pipeline.say(f"PUBLISH {channel} end", str(count))

    async def _write(self, name: str) -> None:
        """Writes, counts and reads back, in an order that differs from run to run."""
        chosen = random.Random()
        async with self._pipeline() as pipeline:
            for number in itertools.count():
                if self.over:
                    break
                key, counter = f"{name}-{chosen.randrange(500)}", f"{name}-count"
                match chosen.choice(["SET", "SET", "SLOWSET", "INCR", "GET"]):
                    case "INCR":
                        text = self.values[counter] = str(int(self.values.get(counter, "0")) + 1)
                        pipeline.say(f"INCR {counter}", text)
                    case "GET":
                        pipeline.say(f"GET {key}", self.values.get(key, "nil"))
                    case how:
                        self.values[key] = str(number)
                        pipeline.say(f"{how} {key} {number}", "OK")
                while pipeline.outstanding >= WINDOW:
                    await pipeline.flush()
                    await asyncio.sleep(0.005)

    async def _let_die(self) -> None:
        """Keys that end after a while, of which some live through several upgrades."""
        line = await self._connect()
        for number, ttl in enumerate(itertools.cycle(TTLS)):
            if self.over:
                break
            key = f"mortal-{number}"
            assert "OK" == await line.ask(f"SET {key} here")
            begun = time.time()
            self.mortal[key] = begun + ttl / 1000, float("inf")
            line.writer.write(f"EXPIRE {key} {ttl}\nGET {key}\n".encode())
            assert "OK" == await line.hear()
            if key in self.mortal:
                self.mortal[key] = begun + ttl / 1000, time.time() + ttl / 1000
            found = await line.hear()
            assert found == "here" or time.time() - begun >= ttl / 1000, f"{key} is gone at once"
            await asyncio.sleep(0.05)
        while self.mortal:
            await asyncio.sleep(0.05)
        for gone in range(number):
            assert "nil" == await line.ask(f"GET mortal-{gone}")
        assert "1" == await line.ask("PUBLISH expired end")
        self.published["expired"] = number

    async def _hurry(self) -> None:
        """New clients, one after the other, that say all they have to say, end their side at once, and
        hear every answer until the service ends its own."""
        for number in itertools.count():
            if self.over:
                break
            line = await self._connect()
            key, count = f"hurry-{number}", 20
            line.writer.write(f"SLOWSET {key} 0\n".encode() + f"INCR {key}\n".encode() * count)
            line.writer.write_eof()
            self.values[key] = str(count)
            assert ["OK", *map(str, range(1, count + 1))] == [
                await line.hear() for _ in range(count + 1)
            ]
            assert await line.ended()
            self.hurried = number + 1
            await asyncio.sleep(0.02)

    async def _gorge(self) -> None:
        """Asks for more than any buffer has room for, and reads it a second later."""
        line = await self._connect(buffer=1 << 16)
        big = self.values["big"] = "y" * BIG
        assert "OK" == await line.ask(f"SET big {big}")
        while not self.over:
            line.writer.write(b"GET big\n" * MANY)
            wanted = self.published["busy"] + self.size.rate
            while not self.over and self.published["busy"] < wanted:
                await asyncio.sleep(0.02)
            for _ in range(MANY):
                assert big == await line.hear()

    async def _balance(self) -> None:
        """Every write that was acknowledged is there, and nothing else is."""
        line = await self._connect()
        for key, text in self.values.items():
            assert text == await line.ask(f"GET {key}"), key
        assert str(len(self.values)) == await line.ask("COUNT")
