# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner hears from its program, and from everybody else."""

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from upgrader.errors import VerifyError
from upgrader.runner.notifications import Notifications
from upgrader.runner.start import ProgramStart
from upgrader.tool.unit_sockets import CONTROL


class Heard:
    """A socket, what it was told, and one that tells it; `answer` is called for each message."""

    def __init__(self) -> None:
        self.messages: list[Mapping[str, str]] = []
        self.answer: Callable[[], object] = lambda: None
        self.notifications = Notifications(self.hear)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.connect("\0" + self.notifications.address[1:])

    def hear(self, fields: Mapping[str, str]) -> None:
        """Note it."""
        self.messages.append(fields)
        assert len(self.messages) < 1000
        self.answer()


@pytest.fixture
def heard() -> Iterator[Heard]:
    made = Heard()
    with made.sock:
        yield made
    made.notifications.close()


def test_only_the_program_is_heard(heard: Heard) -> None:
    """Before its PID is known, nobody is."""
    heard.sock.send(b"READY=1")
    heard.notifications.receive()
    assert [] == heard.messages
    heard.notifications.program = os.getpid()
    heard.sock.send(b"READY=1\nSTATUS=x=y")
    heard.notifications.receive()

    assert [{"READY": "1", "STATUS": "x=y"}] == heard.messages


def test_whoever_sends_without_end_holds_nothing_up(heard: Heard) -> None:
    """There is a turn for the runner's other work after some of it, and the rest waits."""
    heard.notifications.program = os.getpid()
    heard.answer = lambda: heard.sock.send(b"STATUS=again")
    heard.sock.send(b"STATUS=first")
    heard.notifications.receive()
    first = len(heard.messages)
    heard.notifications.receive()

    assert first < len(heard.messages)


def test_a_file_for_everybody() -> None:
    """Where all can reach it; those that runners have left behind which were killed go."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        left = place / "upgrader-run-1"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
            dead.bind(str(left))
        living = Notifications(lambda fields: None, place)
        other = Notifications(lambda fields: None, place)

        assert CONTROL.search(living.address)  # ours, and no listener of the unit
        assert sorted([living.address, other.address]) == sorted(map(str, place.iterdir()))
        assert 0o666 == stat.S_IMODE(Path(other.address).stat().st_mode)
        other.close()
        assert [living.address] == [*map(str, place.iterdir())]
        living.withdraw()
        assert [] == [*place.iterdir()]
        living.close()
        place.chmod(0o700)
        hidden = Notifications(lambda fields: None, place)
        assert hidden.address.startswith("@")
        hidden.close()


def test_a_start_that_is_refused_leaves_no_file() -> None:
    """Also one that comes to no program: whoever hears of it may kill the process at once."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        host: Any = SimpleNamespace(
            notifications=Notifications(lambda fields: None, place),
            options=SimpleNamespace(program=["/nowhere/program"]),
            is_live=True,
        )
        none: Any = None
        assert 1 == len([*place.iterdir()])

        with pytest.raises(VerifyError, match="no such program"):
            asyncio.run(ProgramStart(host, none, none).run())

        assert [] == [*place.iterdir()]
        host.notifications.close()
