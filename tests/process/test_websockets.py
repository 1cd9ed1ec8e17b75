# SPDX-License-Identifier: LGPL-2.1-or-later
"""WebSockets of an application that nobody changed: they move, and their clients do not notice."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.process.chat import DEADLINE
from tests.process.crowd import Broker, Crowd, Requests
from tests.process.websocket_service import LIBRARY, Chat, ask, close_code, frame
from tests.support import eventually
from tests.tables import publish
from upgrader.codes import Code
from upgrader.protocol.channel import ParkedChannel
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.testing import ServiceError

#: The default of uvicorn, and the others.
IMPLEMENTATIONS = [
    "websockets-sansio",
    *(pytest.param(each, marks=pytest.mark.matrix) for each in ("websockets", "wsproto", LIBRARY)),
]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(tmp_path, "--websockets", "move")
    with chat.service:
        yield chat


@pytest.mark.parametrize(
    ("ws", "loop"),
    [
        ("websockets", "asyncio"),
        ("websockets-sansio", "uvloop"),
        ("wsproto", "asyncio"),
        (LIBRARY, "uvloop"),
        *(
            pytest.param(*each, marks=pytest.mark.matrix)
            for each in (("websockets", "uvloop"), ("wsproto", "uvloop"))
        ),
    ],
)
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


def test_what_a_handler_knows_and_leaves(chat: Chat) -> None:
    """Whether it was moved, and a small value of the one before; nothing of that one runs again, no
    `finally` either. A handler that is at something when everything is frozen stays, and is closed."""
    chat.service.environment["UPGRADER_WEBSOCKET_TIMEOUT"] = "0"
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "0"
    chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "200ms"
    go = chat.path.with_name("go")
    chat.service.environment["GO"] = str(go)
    chat.service.start(chat.command("one"))
    with chat.connect("/echo/ann") as ann, chat.connect("/echo/bob") as bob:
        assert "one moved=False value= x" == ask(ann, "x")
        bob.send("slow")
        bob.ping().wait(DEADLINE)  # so the handler has got it

        assert 1 == chat.service.live(chat.command("two")).left_behind

        assert "two moved=True value=x y" == ask(ann, "y")
        assert 1012 == close_code(bob)
        go.touch()
        assert eventually(lambda: not chat.service.draining)
        assert "one bob finally" in chat.service.stderr
        assert "ann finally" not in chat.service.stderr
        chat.service.restart(chat.command("three"))
        assert "three moved=True value=y z" == ask(ann, "z")


HOW = ["raises", "hangs", "refuses", "differs", "raises-later"]


@pytest.mark.parametrize("ws", [*IMPLEMENTATIONS[:-1], LIBRARY])
def test_a_handler_that_does_not_begin(chat: Chat, ws: str) -> None:
    """Its client is closed with 1012, and everybody else goes on, what they send meanwhile included;
    nobody waits longer than a handler may take."""
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "0"
    chat.service.environment["UPGRADER_REPLAY_TIMEOUT"] = "500ms"
    chat.service.start(chat.command("one", "--ws", ws))
    with contextlib.ExitStack() as stack:
        ann = stack.enter_context(chat.connect("/echo/ann"))
        others = [stack.enter_context(chat.connect(f"/in-replay/{how}")) for how in HOW]
        assert ["one moved=False value= x"] + 5 * ["one x"] == [
            ask(each, "x") for each in (ann, *others)
        ]

        assert 0 == chat.service.live(chat.command("two", "--ws", ws)).left_behind

        for other in others:
            with contextlib.suppress(ConnectionClosed):
                other.send("on the way")
        assert "two moved=True value=x y" == ask(ann, "y")
        for other in others:
            assert 1012 == close_code(other)
        assert "two moved=True value=x z" == ask(ann, "z")


def test_too_many_are_refused(chat: Chat) -> None:
    """Of the first fifty more than half do not go on: the others are not asked. All are closed with 1012,
    spread as set."""
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "1s"
    chat.service.start(chat.command("one"))
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(chat.connect("/in-replay/refuses", compression=None))
            for _ in range(60)
        ]
        began = time.monotonic()
        assert 0 == chat.service.live(chat.command("two")).left_behind
        for client in clients:
            assert 1012 == close_code(client)
        assert time.monotonic() - began > 0.5
    assert 50 == chat.service.stderr.count("refused")
    assert "INFO:     connection" not in chat.service.stderr  # nobody has connected


@pytest.mark.parametrize("ws", IMPLEMENTATIONS)
def test_half_a_message_at_the_boundary(chat: Chat, ws: str) -> None:
    """What has come of a message moves: half a frame, and fragments with a ping between them."""
    chat.service.start(chat.command("one", "--ws", ws))
    with chat.connect("/echo/ann") as ann:
        assert "one moved=False value= x" == ask(ann, "x")
        sock = ann.socket
        whole = frame(b"he", fin=False) + frame(b"p", opcode=9) + frame(b"llo", opcode=0)
        value = "x"
        for version, size in ("two", 3), ("three", 11):
            sock.sendall(whole[:size])
            assert 0 == chat.service.live(chat.command(version, "--ws", ws)).left_behind
            sock.sendall(whole[size:])
            assert ann.recv(DEADLINE).endswith("hello")
            assert f"{version} moved=True value={value} {version}" == ask(ann, version)
            value = version


@pytest.mark.parametrize("ws", IMPLEMENTATIONS)
def test_a_close_is_not_undone(chat: Chat, ws: str) -> None:
    """A handler that has closed does not begin anew; nor does one whose client has."""
    chat.service.start(chat.command("one", "--ws", ws))
    with chat.connect("/echo/ann") as ann, chat.connect("/echo/bob") as bob:
        ann.socket.sendall(frame(b"\x03\xe8", opcode=8))
        bob.send("close")
        assert 0 <= chat.service.live(chat.command("two", "--ws", ws)).left_behind
        assert 1000 == close_code(ann)
        assert 4000 == close_code(bob)


@pytest.mark.parametrize("ws", ["websockets-sansio", LIBRARY])
def test_an_upgrade_that_fails_replays_nothing(chat: Chat, ws: str) -> None:
    """The handlers that there are go on, also with what was sent meanwhile."""
    chat.service.start(chat.command("one", "--ws", ws))
    with chat.connect("/echo/ann") as ann:
        assert "one moved=False value= x" == ask(ann, "x")
        with pytest.raises(ServiceError) as failed:
            chat.service.live(chat.command("bad", "--ws", ws))
        assert Code.VERIFY_FAILED is failed.value.code
        assert "bad ann begins" not in chat.service.stderr
        assert "one moved=False value= y" == ask(ann, "y")


def test_an_instance_that_dies_while_handlers_begin(chat: Chat) -> None:
    """A crash, as at any other time: connections end, the listener and the service go on, and nothing
    of a handshake is left with PID 1."""
    chat.service.start(chat.command("one"))
    with chat.connect("/echo/ann") as ann, chat.connect("/in-replay/dies") as bob:
        assert "one x" == ask(bob, "x")
        with contextlib.suppress(ServiceError):  # it may die before anybody is told that it serves
            chat.service.live(chat.command("two"))
        assert chat.service.process is not None
        chat.service.process.wait(DEADLINE)
        chat.service.start(chat.command("three"))
        assert close_code(ann) in (0, 1012)
        with chat.connect("/echo/cid") as cid:
            assert "three moved=False value= x" == ask(cid, "x")
        chat.service.live(chat.command("four"))
        left = [name for name, _ in chat.service.store if "secrets" in name]
        assert [] == left


@pytest.mark.parametrize("ws", ["websockets-sansio", LIBRARY])
def test_who_cannot_take_them(chat: Chat, ws: str) -> None:
    """Without `move` in the new version they end in the old one, as without it here; after a restart
    they are closed with 1012."""
    chat.service.environment["UPGRADER_WEBSOCKET_TIMEOUT"] = "0"
    chat.service.environment["UPGRADER_WEBSOCKET_SPREAD"] = "0"
    chat.service.start(chat.command("one", "--ws", ws))
    for how in chat.service.live, chat.service.upgrade:
        with chat.connect("/echo/ann") as ann:
            assert "moved=False" in ask(ann, "x")
            how(chat.command("two", "--ws", ws, "--websockets", "close"))
            assert 1012 == close_code(ann)
        if how == chat.service.live:
            chat.service.live(chat.command("three", "--ws", ws))


def test_handshakes_are_secrets(chat: Chat) -> None:
    """They are in no image, and PID 1 has nothing of them once the next instance serves."""
    chat.service.start(chat.command("one"))
    with chat.connect(
        "/echo/ann?token=TOPSECRET", additional_headers={"Cookie": "TOPSECRET"}
    ) as ann:
        assert ask(ann, "x")
        chat.service.stop()
        assert 3 == len(chat.service.store)
        holding = []
        for name, fd in chat.service.store:
            parsed = StoreName.parse(name)
            assert parsed
            if parsed.what is Stored.CHANNEL:
                channel = ParkedChannel(fd.duplicate().socket(), name)
                assert channel.open()
                fd = channel.image
            if parsed.what is not Stored.LISTENER and b"TOPSECRET" in os.pread(
                fd.fileno(), 1 << 16, 0
            ):
                holding.append((parsed, fd.duplicate()))
            if parsed.what is Stored.CHANNEL:
                channel.close()
        ((name, secrets),) = holding
        assert StoreName.of_secrets(1) == name
        chat.service.start(chat.command("two"))
        assert "two moved=True value=x y" == ask(ann, "y")
        assert 0 == os.fstat(secrets.fileno()).st_size
        assert "upgrader-listener-http" in [name for name, _ in chat.service.store]
        assert 1 == len(chat.service.store)


@pytest.mark.parametrize(
    ("clients", "lives", "restarts"),
    [(100, 2, 1), pytest.param(2000, 10, 3, marks=pytest.mark.matrix)],
)
def test_a_crowd(chat: Chat, clients: int, lives: int, restarts: int) -> None:
    """Nobody sees a close, and each word reaches each client once, in the order of its speaker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rounds = [chat.service.live] * lives + [chat.service.upgrade] * restarts
    chat.options = (*chat.options, "--no-access-log")
    chat.service.start(chat.command("0"))
    figures = []
    with (
        Requests(chat.path) as requests,
        Crowd(chat.path, clients, each_second=2000 / clients) as crowd,
    ):
        for number, how in enumerate(rounds, 1):
            requests.pause = crowd.pause = 0.0
            said = crowd.said
            how(chat.command(str(number)))
            assert eventually(lambda said=said: crowd.said > said + 5)
            mode = "live" if how == chat.service.live else "restart"
            figures.append((mode, crowd.pause, requests.pause))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [] == crowd.faults[:5]
    assert [] == requests.faults
    assert crowd.said > 5 * len(rounds)
    if clients > 100:
        publish(
            "chat",
            ["upgrade", "messages waited", "requests waited"],
            [
                [mode, f"{words * 1000:.0f} ms", f"{plain * 1000:.0f} ms"]
                for mode, words, plain in figures
            ]
            + [["words said, each heard by all", str(crowd.said), ""]],
        )


def test_what_a_broker_publishes_in_the_gap(chat: Chat, tmp_path: Path) -> None:
    """It is lost, no more and no less: from the freeze to the subscription of the new handler. What the
    old one had in hand is counted and told."""
    chat.service.environment["BROKER"] = str(tmp_path / "broker")
    with Broker(tmp_path / "broker") as broker:
        chat.service.start(chat.command("one"))
        with chat.connect("/news") as news, hearing(news) as heard:
            assert eventually(lambda: heard)
            for version, how in ("two", chat.service.live), ("three", chat.service.upgrade):
                begin, subscribed = len(heard) - 1, len(broker.first)
                assert 0 == how(chat.command(version)).left_behind, chat.service.stderr
                assert eventually(lambda old=subscribed: len(broker.first) > old)
                assert eventually(lambda: heard[-1] > broker.first[-1])
                now = heard[begin:]
                before = max(number for number in now if number < broker.first[-1])
                lost = set(range(now[0], now[-1])) - set(now)
                assert lost == set(range(before + 1, broker.first[-1]))
                assert now == sorted(set(now))
                if how == chat.service.live:
                    assert eventually(lambda: not chat.service.draining)
                    told = "in hand, and lost: 1 message to 1 connection that had moved"
                    assert told in chat.service.stderr


@contextlib.contextmanager
def hearing(client: ClientConnection) -> Iterator[list[int]]:
    """The numbers that a client is told, as they come."""
    heard: list[int] = []

    def hear() -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in client:
                heard.append(int(message))

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        yield heard
    finally:
        client.close()
        thread.join()
