# SPDX-License-Identifier: LGPL-2.1-or-later
"""WebSockets that do not move are closed such that their clients do not all dial again at once."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE
from tests.process.websocket_service import Chat, ask, close_code
from tests.support import eventually

CLIENTS = 20
SPREAD = 2.0  # seconds; between two closes it is a tenth of one


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(tmp_path, "--websockets", "close")
    chat.service.environment |= {
        "UPGRADER_WEBSOCKET_TIMEOUT": "0", "UPGRADER_WEBSOCKET_SPREAD": f"{SPREAD}s"
    }  # fmt: skip
    with chat.service:
        yield chat


def test_a_chat_is_closed(chat: Chat) -> None:
    """In a live upgrade the oldest first, spread as set from the commit on, while the others go on in the
    old instance; by a restart all at once. All are told 1012, and who dials again meets the new version."""
    chat.service.start(chat.command("one"))
    for version, how in ("two", chat.service.live), ("three", chat.service.upgrade):
        with contextlib.ExitStack() as stack:
            connects = (chat.connect(f"/ws/{n}", compression=None) for n in range(CLIENTS))
            clients = [stack.enter_context(each) for each in connects]
            old = ask(clients[0], "x").split()[0]
            assert [f"{old} 0: x"] * (CLIENTS - 1) == [c.recv(DEADLINE) for c in clients[1:]]
            began = time.monotonic()
            assert CLIENTS == how(chat.command(version)).left_behind

            assert 1012 == close_code(clients[0])
            if how == chat.service.live:
                clients[-1].send("still here")
                while (said := clients[-1].recv(DEADLINE)).endswith("left"):
                    pass
                assert f"{old} {CLIENTS - 1}: still here" == said
            with chat.connect("/ws/again") as again:
                assert f"{version} again: x" == ask(again, "x")
            assert {1012} == {close_code(each) for each in clients[1:]}
            if how == chat.service.live:
                assert time.monotonic() - began > SPREAD * (1 - 2 / CLIENTS)
                assert eventually(lambda: not chat.service.draining)
