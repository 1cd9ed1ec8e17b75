# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many clients of a chat, of a real library, with compression and pings; they count what they get."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from pathlib import Path

from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed

DEADLINE = 60.0


class Crowd:
    """Clients `/ws/0`, `/ws/1`, ...; one after the other says its next number, and all write down what
    they hear. `faults`: whatever was lost, doubled or out of order, and each close."""

    def __init__(self, path: Path, clients: int, *, each_second: float) -> None:
        self.faults: list[str] = []
        self.pause = 0.0  #: the longest time from a word to its echo, in seconds
        self._path = path
        self._count = clients
        self._each_second = each_second
        self._said: Counter[int] = Counter()
        self._heard: list[Counter[int]] = [Counter() for _ in range(clients)]
        self._at: dict[tuple[int, int], float] = {}
        self._clients: list[ClientConnection] = []
        self._over = asyncio.Event()
        self._there = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Crowd":
        self._thread.start()
        assert self._there.wait(DEADLINE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    @property
    def said(self) -> int:
        """How many words all clients have said."""
        return self._said.total()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            for number in range(self._count):
                client = unix_connect(
                    str(self._path),
                    f"ws://x/ws/{number}",
                    ping_interval=max(2, self._count / 100),
                    ping_timeout=DEADLINE,
                )
                self._clients.append(await stack.enter_async_context(client))
            hearing = [asyncio.create_task(self._hear(n)) for n in range(self._count)]
            self._there.set()
            await self._talk()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE):
                    while any(heard != self._said for heard in self._heard) and not self.faults:
                        await asyncio.sleep(0.02)
            for number, heard in enumerate(self._heard):
                if heard != self._said:
                    self.faults.append(f"{number} has heard {heard.total()} of {self.said}")
            for task in hearing:
                task.cancel()
            for client in self._clients:
                client.transport.abort()

    async def _talk(self) -> None:
        turn = 0
        while not self._over.is_set():
            number = turn % self._count
            turn += 1
            self._said[number] += 1
            self._at[number, self._said[number]] = time.monotonic()
            try:
                await self._clients[number].send(f"{self._said[number]} {'words ' * 20}")
            except ConnectionClosed:
                self.faults.append(f"{number} cannot speak")
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 1 / self._each_second)

    async def _hear(self, number: int) -> None:
        heard = self._heard[number]
        try:
            async for message in self._clients[number]:
                _, who, what, _ = str(message).split(" ", 3)
                sender, word = int(who.strip(":")), int(what)
                if word != heard[sender] + 1:
                    self.faults.append(
                        f"{number} heard {word} of {sender}, not {heard[sender] + 1}"
                    )
                heard[sender] = word
                if sender == number:
                    self.pause = max(self.pause, time.monotonic() - self._at.pop((number, word)))
        except ConnectionClosed as closed:
            self.faults.append(f"{number} was closed: {closed}")


class Requests(threading.Thread):
    """A client of `/plain` on a connection that it keeps; `pause` is its longest request, in seconds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pause = 0.0
        self.faults: list[str] = []
        self._path = path
        self._over = threading.Event()

    def run(self) -> None:
        connection = self._connect()
        while not self._over.wait(0.005):
            began = time.monotonic()
            try:
                connection.request("GET", "/plain")
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.faults.append(repr(error))
                break
            self.pause = max(self.pause, time.monotonic() - began)
            if answer.will_close:  # it was in flight at a switchover
                connection.close()
                connection = self._connect()
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("x", timeout=DEADLINE)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self._path))
        return connection

    def __enter__(self) -> "Requests":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


class Broker(threading.Thread):
    """Publishes 1, 2, 3, ... to whoever is connected, as a broker with publish and subscribe; `first` has
    the first number that each subscriber was sent."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.first: list[int] = []
        self._path = path
        self._over = threading.Event()
        self._ready = threading.Event()

    def run(self) -> None:
        asyncio.run(self._publish())

    async def _publish(self) -> None:
        subscribers: list[asyncio.StreamWriter] = []

        async def subscribed(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.first.append(number + 1)
            subscribers.append(writer)

        number = 0
        server = await asyncio.start_unix_server(subscribed, self._path)
        self._ready.set()
        while not self._over.is_set():
            number += 1
            for writer in subscribers:
                if not writer.is_closing():
                    writer.write(b"%d\n" % number)
            await asyncio.sleep(0.002)
        server.close()
        for writer in subscribers:
            writer.transport.abort()

    def __enter__(self) -> "Broker":
        self.start()
        assert self._ready.wait(DEADLINE)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
