# SPDX-License-Identifier: LGPL-2.1-or-later
"""WebSockets of an application that nobody changed: they move, and their clients do not notice."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import ClientConnection, unix_connect

from tests.process.chat import DEADLINE
from upgrader.testing import Service

HERE = Path(__file__).parent
IMPLEMENTATIONS = ["websockets", "websockets-sansio", "wsproto"]


class Chat:
    """One service, and clients of it."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.path = directory / "socket"
        self.options = options
        self.service = Service(
            environment={"PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}, timeout=DEADLINE
        )

    def command(self, version: str, *options: str) -> list[str]:
        run = [sys.executable, "-m", "upgrader.asgi", "chat_app:app", "--uds", str(self.path)]
        return ["env", f"VERSION={version}", *run, *self.options, *options]

    def connect(self, path: str, **options: object) -> ClientConnection:
        return unix_connect(str(self.path), f"ws://x{path}", **options)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(tmp_path, "--websockets", "move")
    with chat.service:
        yield chat


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("ws", IMPLEMENTATIONS)
def test_a_chat_goes_on(chat: Chat, ws: str, loop: str) -> None:
    """Live and over a restart, with compression: each message reaches each client once."""
    options = ("--ws", ws, "--loop", loop)
    chat.service.start(chat.command("one", *options))
    with chat.connect("/ws/ann") as ann, chat.connect("/ws/bob") as bob:
        for number, (version, how) in enumerate(
            [("one", None), ("two", chat.service.live), ("three", chat.service.upgrade)]
        ):
            if how:
                assert 0 == how(chat.command(version, *options)).left_behind
            ann.send(f"hello {number}" * 20)
            wanted = f"{version} ann: " + f"hello {number}" * 20
            assert [wanted, wanted] == [ann.recv(DEADLINE), bob.recv(DEADLINE)]
            assert ann.ping().wait(DEADLINE)
        ann.close()
        assert "ann left" == bob.recv(DEADLINE)
