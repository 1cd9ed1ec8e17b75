# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients of shop.py, one thread each, that do what its users do until they are told to stop; they
check each answer, and hold that nothing may fail."""

import contextlib
import hashlib
import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.support import SETTLE
from tests.system.serving import network_of
from upgrader.lab.private_systemd import PrivateSystemd

PIECE = 1 << 16
SERVICE_RESTART = 1012


class _Http(http.client.HTTPConnection):
    """A keep-alive connection of the machine's network; one that has ended with an answer that says so
    is made anew."""

    def __init__(self, machine: PrivateSystemd, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=SETTLE * 2)
        self._machine = machine

    def connect(self) -> None:
        with network_of(self._machine):
            super().connect()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        self.request(method, path, body, headers)
        answer = self.getresponse()
        assert 200 == answer.status, answer.read()
        return answer


class Shoppers:
    """All clients of one service. `size`: bytes of an upload or a download, which takes `seconds`."""

    def __init__(self, machine: PrivateSystemd, port: int, *, size: int, seconds: float) -> None:
        self._machine = machine
        self._port = port
        self._pieces = size // PIECE
        self._pause = seconds / self._pieces
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.acknowledged: dict[str, set[str]] = {"upload": set(), "later": set()}
        self.in_flight: Counter[str] = Counter()
        self.failures: list[str] = []
        self._names = itertools.count()
        kinds = [
            self._upload, self._upload, self._download, self._download, self._events,
            self._chat, self._chat, self._later, self._hash,
        ]  # fmt: skip
        self._threads = [
            threading.Thread(target=self._run, args=(kind, number), daemon=True)
            for number, kind in enumerate(kinds)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each of them end what it is at."""
        self._over.set()
        for thread in self._threads:
            thread.join(SETTLE * 2)

    @property
    def busy(self) -> bool:
        """Whether bodies go both ways now."""
        return min(self.in_flight["upload"], self.in_flight["download"]) > 0

    def rows(self, kind: str) -> list[str]:
        """What the database has."""
        with contextlib.closing(_Http(self._machine, self._port)) as http:
            found: list[str] = json.load(http.ask("GET", f"/rows/{kind}"))
            return sorted(found)

    def _run(self, kind: Callable[[_Http, int], Iterator[None]], number: int) -> None:
        name = kind.__name__.strip("_")
        connection = _Http(self._machine, self._port)
        try:
            for _ in kind(connection, number):
                with self._lock:
                    self.done[name] += 1
                if self._over.is_set():
                    return
        except Exception as error:
            with self._lock:
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            connection.close()

    # What each of them does, again and again

    def _upload(self, http: _Http, seed: int) -> Iterator[None]:
        piece = random.Random(seed).randbytes(PIECE)
        wanted = hashlib.sha256(piece * self._pieces).hexdigest()
        length = str(PIECE * self._pieces)
        while True:
            name = f"{seed}-{next(self._names)}"
            answer = http.ask(
                "POST", f"/upload/{name}", self._paced(piece), **{"Content-Length": length}
            )
            assert wanted == json.load(answer)["sha256"]
            self.acknowledged["upload"].add(name)
            yield

    def _paced(self, piece: bytes) -> Iterator[bytes]:
        self.in_flight["upload"] += 1
        for _ in range(self._pieces):
            time.sleep(self._pause)
            yield piece
        self.in_flight["upload"] -= 1

    def _download(self, http: _Http, seed: int) -> Iterator[None]:
        piece = random.Random(seed).randbytes(PIECE)
        wanted = hashlib.sha256(piece * self._pieces).hexdigest()
        while True:
            answer = http.ask("GET", f"/download/{seed}/{self._pieces}")
            found = hashlib.sha256()
            self.in_flight["download"] += 1
            while data := answer.read(PIECE):
                found.update(data)
                time.sleep(self._pause)
            self.in_flight["download"] -= 1
            assert wanted == found.hexdigest()
            yield

    def _events(self, http: _Http, _: int) -> Iterator[None]:
        last = 0
        while True:
            answer = http.ask("GET", "/events", None, **{"Last-Event-ID": str(last)})
            for line in answer:
                if line.startswith(b"id: "):
                    assert last + 1 == int(line[4:])
                    last += 1
            yield

    def _chat(self, _: _Http, __: int) -> Iterator[None]:
        for number in itertools.count():
            with self._dial() as opened:
                try:
                    while True:
                        text = f"{number} {next(self._names)}"
                        opened.send(text)
                        assert text == opened.recv(SETTLE)
                        yield
                        time.sleep(0.02)
                except ConnectionClosed as error:
                    if error.rcvd is None or error.rcvd.code != SERVICE_RESTART:
                        raise

    def _dial(self) -> ClientConnection:
        with network_of(self._machine):
            sock = socket.create_connection(("127.0.0.1", self._port), SETTLE)
        return connect("ws://x/ws", sock=sock, open_timeout=SETTLE)

    def _later(self, http: _Http, _: int) -> Iterator[None]:
        while True:
            name = str(next(self._names))
            http.ask("POST", f"/later/{name}").read()
            self.acknowledged["later"].add(name)
            yield
            time.sleep(0.05)

    def _hash(self, http: _Http, _: int) -> Iterator[None]:
        while True:
            text = str(next(self._names))
            answer = json.load(http.ask("GET", f"/hash/{text}"))
            assert hashlib.sha256(text.encode()).hexdigest() == answer["sha256"]
            yield
            time.sleep(0.05)
