# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of the `websockets` library's own asyncio server: what it has that uvicorn has not."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from websockets.sync.client import unix_connect

from tests.pages import blocks
from tests.process.chat import DEADLINE
from tests.process.websocket_service import LIBRARY, Chat, ask, close_code, frame
from tests.support import eventually
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call
from upgrader.testing import Service

PAGE = Path(__file__).parents[2] / "docs" / "websockets.md"


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(tmp_path, LIBRARY)
    with chat.service:
        yield chat


def test_the_sample(tmp_path: Path) -> None:
    """That of the page: its clients go on, live and over a restart."""
    (sample,) = (each for each in blocks(PAGE, "python") if "asyncio.run" in each)
    program, path = tmp_path / "sample.py", tmp_path / "socket"
    address = "127.0.0.1:8765"
    assert address in sample
    program.write_text(sample.replace(address, f"unix:{path}"))
    command = [sys.executable, str(program)]
    with Service(timeout=DEADLINE) as service:
        service.start(command)
        with (
            unix_connect(str(path), "ws://x/") as ann,
            unix_connect(str(path), "ws://x/") as bob,
        ):
            for number, how in enumerate((None, service.live, service.upgrade)):
                if how:
                    assert 0 == how(command).left_behind
                ann.send(f"hello {number}")
                assert [f"hello {number}"] * 2 == [ann.recv(DEADLINE), bob.recv(DEADLINE)]


def test_who_only_listens(chat: Chat) -> None:
    """A handler in `wait_closed` moves; with a message that it has not read it stays."""
    chat.service.environment["UPGRADER_WEBSOCKET_TIMEOUT"] = "0"
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "0"
    chat.service.start(chat.command("one"))
    with (
        chat.connect("/news/") as ann,
        chat.connect("/news/") as bob,
        chat.connect("/ws/cid") as cid,
    ):
        bob.send("nobody reads this")
        assert bob.ping().wait(DEADLINE)
        assert "one cid: x" == ask(cid, "x") == ann.recv(DEADLINE) == bob.recv(DEADLINE)

        assert 1 == chat.service.live(chat.command("two")).left_behind

        assert "two cid: y" == ask(cid, "y") == ann.recv(DEADLINE)
        assert 1012 == close_code(bob)
        assert eventually(lambda: not chat.service.draining)
        assert 1 == chat.service.stderr.count("one news finally")  # bob's
        told = "in hand, and lost: 2 messages to 2 connections that had moved"
        assert told in chat.service.stderr


def test_what_is_counted(chat: Chat) -> None:
    """How many handlers are still to begin, have begun and have failed; and in the old instance, which
    drains, how many are suspended."""
    go = chat.path.with_name("go")
    chat.service.environment |= {
        "UPGRADER_WEBSOCKET_TIMEOUT": "1h", "UPGRADER_REPLAY_TIMEOUT": "1h", "GO": str(go)
    }  # fmt: skip
    chat.service.start(chat.command("one"))

    def counts() -> dict[str, int]:
        return cast(dict[str, int], chat.service.describe()["replays"])

    nothing = {"moved": 0, "refused": 0, "waiting": 0, "suspended": 0, "lost": 0}
    assert nothing == counts()
    with (
        chat.connect("/in-replay/waits") as ann,
        chat.connect("/in-replay/refuses") as bob,
        chat.connect("/news/") as cid,
    ):
        assert ["one x"] * 2 == [ask(ann, "x"), ask(bob, "x")]
        cid.send("nobody reads this")
        assert cid.ping().wait(DEADLINE)
        assert 1 == chat.service.live(chat.command("two")).left_behind
        assert eventually(lambda: counts() == {**nothing, "waiting": 1})
        go.touch()
        assert eventually(lambda: counts() == {**nothing, "moved": 1, "refused": 1})
        assert 1012 == close_code(bob)
        (old,) = Path(chat.service.runtime_directory).glob("draining-*.sock")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(old))
            assert {**nothing, "suspended": 2} == call(sock, f"{INTERFACE}.Describe", {})["replays"]


def test_in_the_middle_of_a_message_that_is_read_in_parts(chat: Chat) -> None:
    """The handler has some of it, so it goes on where it is; before the first part, it moves."""
    chat.service.environment["UPGRADER_WEBSOCKET_TIMEOUT"] = "0"
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "0"
    chat.service.start(chat.command("one"))
    with chat.connect("/parts/", compression=None) as ann, chat.connect("/parts/") as bob:
        assert "one x" == ask(bob, "x")
        ann.socket.sendall(frame(b"he", fin=False))
        assert "one he" == ann.recv(DEADLINE)

        assert 1 == chat.service.live(chat.command("two")).left_behind

        assert 1012 == close_code(ann)
        assert "two y" == ask(bob, "y")


def test_a_client_that_has_said_nothing_yet(chat: Chat) -> None:
    """Its connection moves without a handler, whatever of its request it says first."""
    chat.service.start(chat.command("one"))
    request = (
        b"GET /echo/ann HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(chat.path))
        with chat.connect("/echo/bob") as bob:  # so it is accepted
            assert ask(bob, "x")
        assert 0 == chat.service.live(chat.command("two")).left_behind
        for byte in request:
            sock.sendall(bytes([byte]))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 101 ")
        chat.service.restart(chat.command("three"))
        sock.sendall(frame(b"y"))
        assert b"three moved=True value= y" in sock.recv(1 << 16)


def test_options(tmp_path: Path) -> None:
    """Those of `serve` that are about sockets are the listener's."""
    program = tmp_path / "wrong.py"
    program.write_text(
        "import asyncio\nfrom upgrader.integrations.websockets import Adapter\n"
        "async def main():\n    Adapter(print, host='::', subprotocols=['a'])\n"
        "asyncio.run(main())\n"
    )

    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert "TypeError: no option of a handler: host" in ended.stderr
