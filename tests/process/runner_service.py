# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit with a runner, in a test: how it is started, and its clients."""

import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support import SETTLE, Closing, eventually
from upgrader.testing import Service
from upgrader.testing.pid1_bus import Typed

UNAWARE = str(Path(__file__).with_name("unaware.py"))


class RunnerService(Service):
    """A unit with KillMode=process, whose program listens at a path."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = directory / "listener"
        self.version = 0

    def _properties(self) -> Mapping[str, Typed]:
        return {**super()._properties(), "KillMode": ("s", "process")}

    def command(self, *options: str) -> list[str]:
        self.version += 1
        listen = ("--listen", f"main=unix:{self.path}")
        program = (sys.executable, UNAWARE, str(self.version))
        return [sys.executable, "-m", "upgrader.run", *listen, *options, "--", *program]

    def connect(self) -> "Client":
        return Client(self.path)


class Client(Closing):
    """A client of the program."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(SETTLE)
        try:
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise
        self._file = self._sock.makefile("r")

    def ask(self, text: str) -> str:
        self._sock.sendall(text.encode() + b"\n")
        return self.line()

    def line(self) -> str:
        return self._file.readline().rstrip("\n")

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def who(service: RunnerService) -> int:
    """The program that answers a new client."""
    with service.connect() as client:
        return int(client.ask("who"))


def another(service: RunnerService, first: int) -> int:
    """The program that answers beside the first one, which may answer for a moment more."""
    seen: list[int] = []

    def answers() -> bool:
        seen.append(who(service))
        return seen[-1] != first

    assert eventually(answers)
    return seen[-1]
