# SPDX-License-Identifier: LGPL-2.1-or-later
"""WebSockets over TLS, and connections without TLS that meet a version with it."""

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE
from tests.process.tls_clients import CERTIFICATE
from tests.process.websocket_service import Chat, ask, close_code
from tests.support import eventually

SSL = ("--ssl-certfile", str(CERTIFICATE), "--ssl-keyfile", str(CERTIFICATE))


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(tmp_path, "--websockets", "move")
    chat.service.environment |= {
        "UPGRADER_TLS": "move",
        "UPGRADER_WEBSOCKET_TIMEOUT": "0",
        "UPGRADER_WEBSOCKET_SPREAD": "0",
    }
    with chat.service:
        yield chat


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.check_hostname = False
    return context


@pytest.mark.parametrize("loop", ["uvloop", pytest.param("asyncio", marks=pytest.mark.matrix)])
def test_they_move_live(chat: Chat, loop: str) -> None:
    """As without TLS, and those that are refused are closed with 1012. Over a restart all are, and they
    are counted by the reason."""
    chat.options = (*chat.options, *SSL, "--loop", loop)
    chat.service.start(chat.command("one"))
    over_tls = {"ssl": client_context()}
    with (
        chat.connect("/ws/ann", **over_tls) as ann,
        chat.connect("/ws/bob", **over_tls) as bob,
        chat.connect("/in-replay/refuses", **over_tls) as cid,
    ):
        assert "one x" == ask(cid, "x")
        for version in ("two", "three"):
            assert 0 == chat.service.live(chat.command(version)).left_behind
            ann.send(f"hello {version}" * 200)
            wanted = f"{version} ann: " + f"hello {version}" * 200
            assert [wanted, wanted] == [ann.recv(DEADLINE), bob.recv(DEADLINE)]
            assert bob.ping().wait(DEADLINE)
        assert 1012 == close_code(cid)

        assert 2 == chat.service.upgrade(chat.command("four")).left_behind

        assert [1012, 1012] == [close_code(ann), close_code(bob)]
        stayed = {"TLS connections move in a live upgrade only": 2}
        assert stayed == chat.service.describe()["loaded"]["stayed"]


def test_a_version_that_speaks_tls(chat: Chat) -> None:
    """Takes no connection without: in a live upgrade these end in the old one, counted by the reason, and
    after a restart in the new one, which says so."""
    chat.options = (*chat.options, "--timeout-keep-alive", "600")  # starts take a while under load
    chat.service.start(chat.command("one"))
    with (
        contextlib.closing(http.client.HTTPConnection("x", timeout=DEADLINE)) as plain,
        chat.connect("/echo/ann") as ann,
    ):
        plain.sock = socket.socket(socket.AF_UNIX)
        plain.sock.connect(str(chat.path))
        assert '"one"' == get(plain)
        assert ask(ann, "x")

        assert 2 == chat.service.live(chat.command("two", *SSL)).left_behind

        assert '"one"' == get(plain)  # its last answer
        stayed = {"the new version speaks TLS there": 2}
        assert stayed == chat.service.describe()["loaded"]["stayed"]
        assert 1012 == close_code(ann)
        assert eventually(lambda: not chat.service.draining)
    chat.service.restart(chat.command("three"))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(chat.path))
        with chat.connect("/echo/bob") as bob:  # so it is accepted
            assert ask(bob, "x")
            chat.service.restart(chat.command("four", *SSL))
            assert b"" == sock.recv(1)
            assert close_code(bob) in (0, 1012)
            assert "connections without TLS end" in chat.service.stderr


def get(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/plain")
    return connection.getresponse().read().decode()
