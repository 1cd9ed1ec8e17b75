# SPDX-License-Identifier: LGPL-2.1-or-later
"""FDs that nobody declared: left to the program, never used for what is declared, and moved along."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import Client
from upgrader.protocol.fd import Fd
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

PROGRAM = """
import json, logging, os, sys, upgrader
logging.basicConfig(level=logging.WARNING)
options = json.loads(sys.argv[1])
with upgrader.attach("holder") as instance:
    listeners = [instance.listener(name, bind=bind) for name, bind in options["listeners"].items()]

    @upgrader.state("count")
    class Count:
        count: int = 0

    instance.state(Count)

    def talk(peer, count: Count):
        for line in peer.lines():
            command, _, argument = line.decode().partition(" ")
            answer = ""
            if command == "passed":
                answer = json.dumps([
                    (item.name, os.pread(item.fd.fileno(), 100, 0).decode() if not item.is_socket else "socket")
                    for item in instance.passed
                ])
            if command == "keep":
                memfd = os.memfd_create("own")
                os.write(memfd, argument.encode())
                with os.fdopen(memfd):
                    instance.keep("own", memfd_owner(memfd))
            if command == "add":
                count.count += 1
                answer = str(count.count)
            peer.write(answer.encode() + b"\\n")

    class memfd_owner:
        def __init__(self, number): self.number = number
        def fileno(self): return self.number

    for listener in listeners:
        instance.connections(listener)(talk)
    for _ in instance.serve():
        pass
"""


class Holder:
    """The program, and what PID 1 passes it besides."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "socket"
        (directory / "holder.py").write_text(PROGRAM)
        self.service = Service()

    def command(self, **listeners: str | None) -> list[str]:
        options = {"listeners": listeners or {"chat": f"unix:{self.path}"}}
        return [sys.executable, str(self.directory / "holder.py"), json.dumps(options)]

    def passes(self, name: str, text: str) -> None:
        memfd = os.memfd_create("x")
        os.write(memfd, text.encode())
        self.service.store.append((name, Fd(memfd)))

    def listens(self, name: str, sock: socket.socket, number: int) -> None:
        sock.bind(f"{self.path}.{number}")
        sock.listen()
        self.service.store.append((name, Fd(os.dup(sock.fileno()))))

    def ask(self, text: str, path: Path | None = None) -> str:
        with Client(path or self.path) as client:
            return client.ask(text)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path)
    with holder.service:
        yield holder


def test_u1_a_stored_memfd_is_left_to_the_program(holder: Holder) -> None:
    """At a start, after a crash, and in a restart; the only declared listener is bound all the same."""
    holder.passes("mine", "precious")
    for begin in (holder.service.start, holder.service.restart):
        begin(holder.command())
        assert [["mine", "precious"]] == json.loads(holder.ask("passed"))
    assert "1" == holder.ask("add")
    holder.service.kill()
    assert Origin.COLD is holder.service.start(holder.command()).origin
    assert [["mine", "precious"]] == json.loads(holder.ask("passed"))
    assert "mine" in [name for name, _ in holder.service.store]


def test_u1_a_listener_of_another_name_is_not_used_beside_others(holder: Holder) -> None:
    """With two declared listeners nothing is guessed; it is named, because nobody accepts there."""
    with socket.socket(socket.AF_UNIX) as sock:
        holder.listens("other", sock, 1)
        second = f"unix:{holder.directory}/second"
        holder.service.start(holder.command(chat=f"unix:{holder.path}", second=second))

        assert [["other", "socket"]] == json.loads(holder.ask("passed"))
    assert "'other' that PID 1 passed is not declared" in holder.service.stderr


def test_u1_the_only_listening_socket_is_used_beside_a_file(holder: Holder) -> None:
    """Of the unit's only .socket, whatever it is called there."""
    holder.passes("mine", "precious")
    with socket.socket(socket.AF_UNIX) as sock:
        holder.listens("holder.socket", sock, 1)
        holder.service.start(holder.command(chat=None))
        path = Path(f"{holder.path}.1")

        assert [["mine", "precious"]] == json.loads(holder.ask("passed", path))
        holder.service.restart(holder.command(chat=None))
        assert [["mine", "precious"]] == json.loads(holder.ask("passed", path))


def test_u1_what_was_passed_is_named_if_the_declared_one_is_missing(holder: Holder) -> None:
    """And so is a file under the name of a listener."""
    holder.passes("mine", "precious")
    with pytest.raises(ServiceError) as missing:
        holder.service.start(holder.command(chat=None))
    assert "PID 1 passed none of that name, but 'mine', which is not declared," in str(
        missing.value.stderr
    )
    holder.passes("chat", "precious")
    with pytest.raises(ServiceError) as wrong:
        holder.service.start(holder.command(chat=None))
    assert "listener 'chat': the manifest says SOCK_STREAM" in wrong.value.stderr


def test_u1_what_a_program_keeps(holder: Holder) -> None:
    """It is stored under a name that library 0.1.0 lets go of, and is there after a crash."""
    holder.service.start(holder.command())
    holder.ask("keep first")
    holder.ask("keep second")
    assert [["own", "second"]] == json.loads(holder.ask("passed"))
    for _ in range(2):
        holder.service.kill()
        holder.service.start(holder.command())
        assert [["own", "second"]] == json.loads(holder.ask("passed"))
        holder.service.restart(holder.command())
    assert ["upgrader-entry-kept.own"] == [
        name for name, _ in holder.service.store if "listener" not in name
    ]


def test_u7_all_sockets_of_one_name_serve(holder: Holder) -> None:
    """At a start, after a crash, and in a restart."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        holder.listens("chat", first, 1)
        holder.listens("chat", second, 2)
        paths = [Path(f"{holder.path}.{number}") for number in (1, 2)]
        count = 0
        holder.service.start(holder.command(chat=None))
        clients = [Client(path) for path in paths]
        for again in (None, holder.service.restart, holder.service.restart):
            if again:
                again(holder.command(chat=None))
            for path in paths:
                count += 1
                assert str(count) == holder.ask("add", path)
        for client in clients:
            count += 1
            assert str(count) == client.ask("add")
            client.close()
        holder.service.kill()
        holder.service.start(holder.command(chat=None))
        assert ["1", "2"] == [holder.ask("add", path) for path in paths]
        assert [] == json.loads(holder.ask("passed", paths[1]))
        assert ["chat", "chat"] == [name for name, _ in holder.service.store]
