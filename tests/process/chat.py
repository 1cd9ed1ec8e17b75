# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service of program.py under test, in the versions that a test asks for, and clients of it."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import Closing
from upgrader.protocol.status_text import Status
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("program.py")
DEADLINE = 30.0


class Client(Closing):
    """A connection that waits for at most DEADLINE."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self._file = self.sock.makefile("rb")

    def send(self, text: str) -> None:
        self.sock.sendall(text.encode())

    def line(self) -> str:
        return self._file.readline().decode().rstrip("\n")

    def ask(self, text: str) -> str:
        self.send(text + "\n")
        return self.line()

    def take(self, size: int) -> str:
        return self._file.read(size).decode()

    def rest(self) -> bytes:
        return self._file.read()

    def gone(self) -> bool:
        """Whether the connection ends without another word; a reset means unread bytes."""
        try:
            return self._file.read() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self.sock.close()


class Chat:
    """The service of program.py, in the versions that a test asks for."""

    def __init__(self, face: str, directory: Path, **environment: str) -> None:
        self.face = face
        self.path = directory / "socket"
        self.work = directory / "work"
        self.work.mkdir()
        self.service = Service(environment=environment, timeout=DEADLINE)

    def command(self, **options: Any) -> list[str]:
        options = {"face": self.face, "bind": f"unix:{self.path}", **options}
        return [sys.executable, str(PROGRAM), json.dumps(options)]

    def start(self, **options: Any) -> Status:
        return self.service.start(self.command(**options))

    def stop(self) -> None:
        self.service.stop()

    def restart(self, **options: Any) -> Status:
        return self.service.restart(self.command(**options))

    def fails(self, **options: Any) -> str:
        """Start a version that must not become ready; returns its stderr."""
        with pytest.raises(ServiceError) as caught:
            self.start(**options)
        return caught.value.stderr

    def connect(self) -> Client:
        return Client(self.path)

    def reachable(self) -> bool:
        """Whether somebody listens: the file of the socket is there a moment before."""
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    @property
    def stored(self) -> list[str]:
        return sorted(name for name, _ in self.service.store)

    @property
    def fds(self) -> int:
        assert self.service.process is not None
        return len(os.listdir(f"/proc/{self.service.process.pid}/fd"))
