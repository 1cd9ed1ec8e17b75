# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a handler has started and answered for, what it does after a wait that was in vain, and what a
program receives past the library."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually
from upgrader.codes import Code
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("rude.py")
CLIENTS = 16
ROUNDS = 2
TIMES = {"UPGRADER_DRAIN_TIMEOUT": "100ms", "UPGRADER_MIGRATION_TIMEOUT": "2s"}


@pytest.fixture
def rude(tmp_path: Path) -> Iterator[tuple[Service, list[str], Path]]:
    path = tmp_path / "socket"
    command = [sys.executable, str(PROGRAM), str(tmp_path)]
    with Service(timeout=DEADLINE) as service:
        service.start(command)
        service.environment.update(TIMES)
        yield service, command, path


@pytest.mark.parametrize("how", ["live", "upgrade"])
def test_p1_a_turn_of_what_an_answered_request_has_started_is_taken(
    how: str, rude: tuple[Service, list[str], Path]
) -> None:
    """Its handler is at a safe point again before the turn begins: it waits for no migration."""
    service, command, path = rude
    upgrade: Callable[[list[str]], object] = getattr(service, how)
    over = threading.Event()
    answered = [0] * CLIENTS

    def ask(number: int) -> None:
        with Client(path) as client:
            while not over.is_set():
                if "OK" == client.ask("later"):
                    answered[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            upgrade(command)
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
    upgrade(command)

    with Client(path) as client:
        assert str(sum(answered)) == client.ask("count")


@pytest.mark.parametrize("sent", ["patient\n", "long\nmore than fits\n"])
def test_p1_a_handler_whose_wait_was_in_vain_is_busy(
    sent: str, rude: tuple[Service, list[str], Path], tmp_path: Path
) -> None:
    """What it does after a time-out, or a message that is too long, is not done twice."""
    service, command, path = rude
    service.upgrade(command)  # with its limits
    with Client(path) as client:
        client.send(sent)
        with Client(path) as other:
            while other.ask("count") == "0":
                pass
        with pytest.raises(ServiceError) as caught:
            service.live(command)
        assert Code.BUSY_WORK == caught.value.code
        (tmp_path / "go").touch()
        assert "1" == client.line()
    service.live(command)


@pytest.mark.parametrize(
    ("how", "way"),
    [
        ("live", "copy"),
        ("upgrade", "transport"),
        pytest.param("live", "reader", marks=pytest.mark.matrix),
        pytest.param("live", "transport", marks=pytest.mark.matrix),
        pytest.param("upgrade", "reader", marks=pytest.mark.matrix),
        pytest.param("upgrade", "copy", marks=pytest.mark.matrix),
    ],
)
def test_p8_a_datagram_is_received_once(how: str, way: str, tmp_path: Path) -> None:
    """Callbacks of the program's own, and transports, get nothing more once another instance has it."""
    command = [sys.executable, str(PROGRAM), str(tmp_path), way]
    over, sent = threading.Event(), [0]

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(DEADLINE)
            while not over.wait(0.0005):
                sock.sendto(b"x", str(tmp_path / "box"))
                sent[0] += 1

    with Service(timeout=DEADLINE) as service:
        service.start(command)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            for _ in range(ROUNDS):
                getattr(service, how)(command)
        finally:
            over.set()
            sender.join(DEADLINE)

        with Client(tmp_path / "socket") as client:
            assert eventually(lambda: str(sent[0]) == client.ask("count"))
