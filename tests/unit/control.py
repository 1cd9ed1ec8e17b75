# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance that answers on its socket as it is told to, and clients of it; asserts nothing."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import SETTLE
from upgrader.codes import Code
from upgrader.instance.control_listener import Caller, Places
from upgrader.instance.control_socket import Control
from upgrader.instance.phases import News, Phases
from upgrader.protocol import varlink
from upgrader.protocol.rendezvous import socket_name
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call

DESCRIBE = f"{INTERFACE}.Describe"


class Instance:
    """Answers as told."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.progress = Phases()
        self.reloading = threading.Event()
        self.reloaded = threading.Event()
        self.channels: list[socket.socket] = []
        self.big = ""
        self.upgrades: list[str] = []
        self.revoked = ("", Code.UNKNOWN)

    def describe(self) -> dict[str, Any]:
        return {"service": "x", "version": self.big}

    def describe_to_all(self) -> dict[str, Any]:
        return {"service": "x", "partial": True}

    def query(self) -> News:
        return self.progress.news

    def set_parameters(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        raise varlink.invalid("parameters")

    def cancel(self, caller: Caller) -> dict[str, Any]:
        raise varlink.denied()

    def expect(self, caller: Caller, upgrade: str) -> None:
        self.callers.append(caller)
        self.upgrades.append(upgrade)

    def preflight(self, caller: Caller, upgrade: str) -> None:
        self.upgrades.append(upgrade)

    def withdraw(self, caller: Caller, upgrade: str) -> dict[str, Any]:
        raise varlink.denied()

    def reload(self, caller: Caller) -> None:
        self.reloading.set()
        self.reloaded.wait(SETTLE)

    def register(self, caller: Caller, pid: int, upgrade: str) -> None:
        self.callers.append(Caller(pid, caller.uid))

    def revoke(self, caller: Caller, pid: int, why: str, code: Code) -> None:
        self.revoked = why, code

    def try_states(self, caller: Caller) -> dict[str, Any]:
        return {"trials": []}

    def negotiate(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"generation": 7}

    def migrate(self, sock: socket.socket) -> None:
        self.channels.append(sock)


@contextlib.contextmanager
def connected(place: Path | str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(place))  # which waits while the backlog is full
        sock.settimeout(SETTLE)
        yield sock


@contextlib.contextmanager
def named(instance: Instance) -> Iterator[socket.socket]:
    """A client of one that answers at an abstract name, and stops after it."""
    name = socket_name(os.urandom(16).hex())
    with contextlib.closing(Control(Places(name), instance, "1.0")) as answering:
        answering.open()
        with connected(name) as sock:
            yield sock


def describe(path: Path) -> Any:
    with connected(path) as sock:
        return call(sock, DESCRIBE, {})


def is_dropped(sock: socket.socket) -> bool:
    """Whether the connection is closed by the other side, whatever was in flight."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True
