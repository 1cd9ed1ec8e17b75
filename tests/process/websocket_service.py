# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chat under test, of uvicorn or of the `websockets` library, and clients of it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, unix_connect

from tests.process.chat import DEADLINE
from upgrader.testing import Service

HERE = Path(__file__).parent
#: Stands for an implementation of uvicorn's: the asyncio server of `websockets`.
LIBRARY = "library"


class Chat:
    """One service, and clients of it."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.path = directory / "socket"
        self.options = options
        self.service = Service(
            environment={"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}, timeout=DEADLINE
        )

    def command(self, version: str, *options: str) -> list[str]:
        given = [*self.options, *options]
        run = [sys.executable, "-m", "upgrader.asgi", "chat_app:app", "--uds", str(self.path)]
        if LIBRARY in given:
            run = [sys.executable, str(HERE / "library_app.py"), str(self.path)]
            given = [each for each in given if each in ("close", "uvloop")]
        return ["env", f"VERSION={version}", *run, *given]

    @contextlib.contextmanager
    def connect(self, path: str, **options: object) -> Iterator[ClientConnection]:
        over = False
        scheme = "wss" if "ssl" in options else "ws"
        try:
            with unix_connect(str(self.path), f"{scheme}://x{path}", **options) as client:
                yield client
                over = True
        except ConnectionClosed:  # which may have been what the test is about
            if not over:
                raise


def close_code(client: ClientConnection) -> int:
    """With which the server closes, whatever it has sent before."""
    try:
        while client.recv(DEADLINE):
            pass
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else 0
    return 0


def ask(client: ClientConnection, text: str) -> str:
    client.send(text)
    return str(client.recv(DEADLINE))


def frame(data: bytes, opcode: int = 1, *, fin: bool = True) -> bytes:
    """As a client sends it, masked with zeros."""
    return bytes([opcode | (0x80 if fin else 0), 0x80 | len(data)]) + bytes(4) + data
