# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients have used up every FD that a service may have, and others ask it: a restart loses nothing."""

import contextlib
import socket
from pathlib import Path

import pytest

from tests.process.chat import Chat, Client
from tests.support import eventually
from upgrader.protocol.rendezvous import SOCKET

_LIMIT = 64
_CLIENTS = 80
_ASKING = 12


@pytest.mark.parametrize("face", ["aio", "blocking"])
def test_a1_a_restart_without_free_fds(face: str, tmp_path: Path) -> None:
    """What is kept for parking is taken by nobody: neither by clients that wait for a number while
    work comes to its end, nor by those who ask the instance."""
    chat = Chat(face, tmp_path, UPGRADER_DRAIN_TIMEOUT="3s")
    with chat.service, contextlib.ExitStack() as stack:
        command = ["prlimit", f"--nofile={_LIMIT}:{_LIMIT}", *chat.command()]
        chat.service.start(command)
        place = chat.service.runtime_directory / SOCKET
        assert eventually(place.exists)
        for _ in range(_ASKING):
            asking = stack.enter_context(socket.socket(socket.AF_UNIX))
            asking.connect(str(place))
        clients = [stack.enter_context(Client(chat.path)) for _ in range(_CLIENTS)]
        for client in clients:
            client.send("add\n")
        assert clients[0].line().startswith("1 ")
        assert eventually(lambda: chat.fds > _LIMIT - 6)
        clients[1].line()
        busy = int(face == "aio")  # the other one does one thing at a time
        if busy:
            assert "holding" == clients[1].ask("hold")
        status = chat.service.restart(command)

        assert (2, busy) == (status.generation, status.left_behind), chat.service.stderr
        assert clients[0].ask("add").split()[1] == "2"
        assert {client.line().split()[1] for client in clients[2:28]} == {"1"}
