# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients of a program behind a runner, which note how they fare; asserts nothing."""

import contextlib
import functools
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tests import fastcgi
from tests.support import SETTLE
from tests.system.serving import Service, network_of
from upgrader.lab.private_systemd import PrivateSystemd

_PAUSE = 0.005  # seconds between two requests of a client


class Addressed(Protocol):
    """Whatever answers at a port inside a machine."""

    @property
    def machine(self) -> PrivateSystemd: ...
    @property
    def port(self) -> int: ...


def connect(service: Addressed, listener: str = "tcp") -> socket.socket:
    """A new connection at its port, or at the path of its UNIX listener; raises OSError."""
    if listener == "unix":
        assert isinstance(service, Service)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SETTLE)
        try:
            sock.connect(str(service.inside(f"/run/{service.name}/socket")))
        except OSError:
            sock.close()
            raise
        return sock
    with network_of(service.machine):
        return socket.create_connection(("127.0.0.1", service.port), SETTLE)


def get(service: Addressed, path: str = "/", listener: str = "tcp") -> bytes:
    """The body of an answer on a new connection; raises OSError or ValueError."""
    if isinstance(service, Service) and "php-fpm" in service.name:
        with connect(service, listener) as sock:
            sock.sendall(fastcgi.request(f"/srv/{service.name}/index.php", path.strip("/")))
            return fastcgi.answer(b"".join(iter(lambda: sock.recv(65536), b"")))
    with contextlib.closing(http.client.HTTPConnection("service")) as connection:
        connection.sock = connect(service, listener)
        return _asked(connection, path, {"Connection": "close"})


def _asked(connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> bytes:
    """Raises ConnectionError if there is no answer, and ValueError if it is not whole or not good."""
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
    except http.client.BadStatusLine as error:
        if isinstance(error, ConnectionError):
            raise
        raise ValueError(f"answered {error.line!r}") from error
    try:
        body = answer.read()
    except (ConnectionError, http.client.IncompleteRead) as error:
        raise ValueError(f"an answer without its end: {error!r}") from error
    if answer.status != 200:
        raise ValueError(f"answered {answer.status} {body[:200]!r}")
    return body


class Kept:
    """One connection after the other, each for as many requests as the program answers on it."""

    def __init__(self, service: Addressed, listener: str) -> None:
        self._service, self._listener = service, listener
        self._connection: http.client.HTTPConnection | None = None
        self.closed = 0  #: connections that ended without an answer to a further request
        self.until_closed = 0.0  #: how long such a request has waited for that at most, in seconds

    def get(self) -> float:
        """Ask; again on a new connection, if an old one ends without an answer: returns how many seconds
        that took. Raises OSError or ValueError."""
        in_vain = 0.0
        if self._connection and self._connection.sock:
            began = time.monotonic()
            try:
                _asked(self._connection, "/", {})
            except ConnectionError:
                in_vain = time.monotonic() - began
                self.closed += 1
                self.until_closed = max(self.until_closed, in_vain)
            else:
                return 0.0
        self.close()
        self._connection = http.client.HTTPConnection("service")
        self._connection.sock = connect(self._service, self._listener)
        try:
            _asked(self._connection, "/", {})
        except BaseException:
            self.close()  # one that has got no answer takes no further request
            raise
        return in_vain

    def close(self) -> None:
        """Ask no more."""
        if self._connection:
            self._connection.close()


@dataclass
class Load:
    """What clients have seen: answers, failures, the longest wait for one in seconds, the bytes of each stream
    that has ended, the connections of `Kept` clients that were closed, and the longest wait for that."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0
    streams: list[int] = field(default_factory=list)
    closed: int = 0
    until_closed: float = 0.0


class _Clients:
    def __init__(self, begun: threading.Barrier) -> None:
        self.seen, self.over = Load(), threading.Event()
        self._begun, self._lock = begun, threading.Lock()

    def ask(self, name: str, once: Callable[[], float]) -> None:
        """Ask all the time; `once` returns how much of its time is counted apart."""
        self._begun.wait(SETTLE)
        while not self.over.is_set():
            began = time.monotonic()
            failure, apart = "", 0.0
            try:
                apart = once()
            except (OSError, ValueError) as error:
                failure = f"{name}: {error!r}"
            with self._lock:
                self.seen.longest = max(self.seen.longest, time.monotonic() - began - apart)
                if failure:
                    self.seen.failures.append(failure)
                else:
                    self.seen.answers += 1
            time.sleep(_PAUSE)

    def stream(self, service: Addressed, listener: str) -> None:
        """Take a stream to its end."""
        self._begun.wait(SETTLE)
        try:
            self.seen.streams.append(len(get(service, "/stream", listener)))
        except (OSError, ValueError) as error:
            self.seen.failures.append(f"stream: {error!r}")


@contextlib.contextmanager
def load(
    service: Addressed,
    *,
    streams: int = 0,
    listeners: Sequence[str] = ("tcp",),
    keeps: bool = False,
) -> Iterator[Load]:
    """For each listener one new connection after the other, and streams; with `keeps`, also a client that
    keeps its connection. At the end all are over."""
    kept = Kept(service, listeners[0])

    def once(listener: str) -> float:
        get(service, listener=listener)
        return 0.0

    asking: list[tuple[str, Callable[[], float]]] = [
        (each, functools.partial(once, each)) for each in listeners
    ]
    if keeps:
        asking.append((f"kept {listeners[0]}", kept.get))
    clients = _Clients(threading.Barrier(len(asking) + streams + 1))
    streaming = [
        threading.Thread(target=clients.stream, args=(service, listeners[number % len(listeners)]))
        for number in range(streams)
    ]
    threads = [threading.Thread(target=clients.ask, args=each) for each in asking]
    for thread in (*streaming, *threads):
        thread.start()
    clients._begun.wait(SETTLE)
    try:
        yield clients.seen
    finally:
        for thread in streaming:
            thread.join(SETTLE)
        clients.over.set()
        for thread in threads:
            thread.join(SETTLE)
        kept.close()
        clients.seen.closed, clients.seen.until_closed = kept.closed, kept.until_closed


def version(service: Addressed, listener: str = "tcp") -> int:
    """The version that answers; raises OSError or ValueError."""
    return int(get(service, listener=listener).split()[1])
