# SPDX-License-Identifier: LGPL-2.1-or-later
"""What another program has put into the FD store under names of ours: named, kept aside, never used, and
the service starts."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import Client
from upgrader.protocol.channel import new_ledger
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("holder.py")
#: What the program itself has there.
OWN = ["upgrader-entry-memory.cache", "upgrader-listener-chat"]


class Place:
    """A service, a file of somebody else, and what else there is of his."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.service = Service()
        self.file = directory / "file"
        self.file.write_text("precious")
        options = {
            "face": "blocking",
            "bind": f"unix:{directory}/socket",
            "backends": {"cache": ["memory", [4096], {}]},
        }
        self.command = [sys.executable, str(PROGRAM), json.dumps(options)]

    def open(self) -> Fd:
        return Fd(os.open(self.file, os.O_RDWR | os.O_CLOEXEC))

    def store(self, name: str, fd: Fd | socket.socket, *, first: bool = False) -> None:
        kept = self.service.store
        kept.insert(0 if first else len(kept), (name, Fd(fd.detach())))

    def add(self) -> str:
        """What the program counts in its memory."""
        with Client(self.directory / "socket") as client:
            return client.ask("do cache add")

    @property
    def names(self) -> list[str]:
        """What is stored, without what goes a few seconds after a live upgrade."""
        names = [name for name, _ in self.service.store]
        return sorted(name for name in names if not name.startswith("upgrader-insurance-"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with place.service:
        yield place


def magic() -> Fd:
    """What begins as no record of ours does."""
    one, other = socket.socketpair()
    with other:
        other.send(b"GET / HTTP/1.1\r\n".ljust(192))
        return Fd(one.detach())


def listening() -> Fd:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return Fd(sock.detach())


def connected() -> Fd:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Fd(socket.create_connection(server.getsockname()).detach())


def test_each_wrong_one_is_named_and_kept_aside(place: Place) -> None:
    """A start, a restart, a crash and a live upgrade with them: none of them is changed or lost."""
    wrong = {
        "upgrader-listener-chat": place.open(),
        "upgrader-channel-3": place.open(),
        "upgrader-channel-4": magic(),
        "upgrader-channel-5": listening(),
        "upgrader-channel-6": connected(),
        "upgrader-insurance-7": place.open(),
        "upgrader-image-8": place.open(),
        "upgrader-ledger-8": new_ledger(),
        "upgrader-image-9": Fd(os.memfd_create("x")),
        "upgrader-ledger-9": place.open(),
        "upgrader-entry-secrets.3": place.open(),
        "upgrader-entry-memory.cache": place.open(),
    }
    for name, fd in wrong.items():
        place.store(name, fd)
    aside = sorted(
        name.replace("upgrader-", "upgrader-aside-")
        for name in wrong
        if name != "upgrader-ledger-8"  # which is a part of nothing
    )
    stored = [fd for name, fd in place.service.store if name != "upgrader-ledger-8"]
    inodes = sorted(identify(fd).inode for fd in stored)

    assert Origin.COLD is place.service.start(place.command).origin
    for name in aside:
        assert f"; it is kept there as {name}" in place.service.stderr
    assert "1" == place.add()
    assert sorted([*aside, *OWN]) == place.names
    place.service.restart(place.command)
    assert "2" == place.add()
    place.service.kill()
    place.service.start(place.command)
    assert "3" == place.add()
    place.service.live(place.command)
    assert "4" == place.add()

    assert sorted([*aside, *OWN]) == place.names
    kept = [fd for name, fd in place.service.store if "aside" in name]
    assert inodes == sorted(identify(fd).inode for fd in kept)
    assert "precious" == place.file.read_text()


@pytest.mark.parametrize("first", [True, False])
def test_beside_our_own(first: bool, place: Place) -> None:
    """Whatever their order, ours is used, and stays in the store."""
    place.service.start(place.command)
    assert "1" == place.add()
    place.service.kill()
    for name in OWN:
        place.store(name, place.open(), first=first)
    place.service.start(place.command)
    assert "2" == place.add()
    aside = [name.replace("upgrader-", "upgrader-aside-") for name in OWN]
    assert sorted([*aside, *OWN]) == place.names
    place.service.kill()
    place.service.start(place.command)
    assert "3" == place.add()
