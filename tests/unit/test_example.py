# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example service: its HTTP, and the upgrade between its two versions the way an author would test it."""

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from upgrader.lab.demo.bad_versions import Bad, make
from upgrader.lab.demo.example import http11
from upgrader.lab.demo.responses import Chunk, Response, ResponseReader
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service

WEB1 = [sys.executable, "-m", "upgrader.lab.demo.example.web1"]
WEB2 = [sys.executable, "-m", "upgrader.lab.demo.example.web2"]

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"


class Client:
    """One connection to the service."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self._reader = ResponseReader()
        self._events: list[Response | Chunk] = []

    def ask(self, data: bytes) -> Response:
        self.sock.sendall(data)
        event = self.next()
        assert isinstance(event, Response)
        return event

    def next(self) -> Response | Chunk:
        while not self._events:
            data = self.sock.recv(65536)
            assert data, "the service closed the connection"
            self._events += self._reader.feed(data)
        return self._events.pop(0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(environment={"WEB_BIND": f"unix:{tmp_path}/web"}) as running:
        running.start(WEB1)
        yield running


@pytest.fixture
def connect(service: Service, tmp_path: Path) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(tmp_path / "web"))
        return clients[-1]

    yield connect
    for client in clients:
        client.sock.close()


class TestFrame:
    @pytest.mark.parametrize("message", [GET, POST])
    def test_a_request_is_whole_at_its_last_byte(self, message: bytes) -> None:
        """Every shorter piece is incomplete, and what follows belongs to the next request."""
        for length in range(len(message)):
            assert http11.frame(bytearray(message[:length])) is None
        assert http11.frame(bytearray(message + GET)) == len(message)

    @pytest.mark.parametrize(
        ("message", "status"),
        [
            (b"GET /\r\n\r\n", 400),
            (b"GET / HTTP/1.0\r\n\r\n", 400),
            (b"GET x HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length : 3\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: -3\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", 413),
            (b"GET / HTTP/1.1\r\nContent-Length: 65536\r\n\r\n", 413),
            (b"GET /" + b"x" * 70_000, 413),
        ],
    )
    def test_nonsense_is_refused(
        self, connect: Callable[[], Client], message: bytes, status: int
    ) -> None:
        """What makes no sense, or is too long, is answered with an error, and the connection closed."""
        client = connect()

        assert client.ask(message).status == status
        assert client.sock.recv(1) == b""


def test_keep_alive_and_close(connect: Callable[[], Client]) -> None:
    """Requests sent at once are answered in order; after one with `Connection: close` it is closed."""
    client = connect()
    client.sock.sendall(GET + POST + GET.replace(b"Host: x", b"Connection: close"))
    answers = [client.next() for _ in range(3)]

    assert ["1", "2", "3"] == [
        answer.headers["connection-requests"] for answer in answers if isinstance(answer, Response)
    ]
    assert client.sock.recv(1) == b""


def test_upgrade_and_downgrade(service: Service, connect: Callable[[], Client]) -> None:
    """Counters, connections and a stream go from version 1 to 2 and back; the new field comes and goes."""
    idle, stream = connect(), connect()
    idle.ask(GET)
    stream.ask(b"GET /stream HTTP/1.1\r\n\r\n")
    lines = [stream.next()]

    for command, version in [(WEB2, "2"), (WEB1, "1")]:
        assert service.upgrade(command).origin is Origin.RESTART
        answer = idle.ask(GET)
        assert answer.headers["service-version"] == version
        assert ("service-streamed" in answer.headers) == (version == "2")
        lines += [stream.next(), stream.next()]

    assert answer.headers["service-requests"] == "4"
    assert answer.headers["connection-requests"] == "3"
    numbers = [int(line.data.split()[0]) for line in lines if isinstance(line, Chunk)]
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", Bad)
def test_every_bad_version_is_a_program(bad: Bad) -> None:
    """It differs from the good one, and Python can read it: what fails is what is meant to fail."""
    text = Path(http11.__file__).with_name("web1.py").read_text()

    compile(made := make(bad, text), bad, "exec")

    assert text != made


def test_no_bad_version_of_another_program() -> None:
    """A change that cannot be made is not passed over in silence."""
    with pytest.raises(ValueError, match="exactly one"):
        make(Bad.SLOW, "print()")
