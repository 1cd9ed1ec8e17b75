# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with all that a chat has, restarted and failed under load; and how instances end."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Chat, Client
from tests.support import eventually
from upgrader.protocol.rendezvous import SOCKET, STATUS_SOCKET
from upgrader.protocol.status_text import Origin
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call

ROUNDS = 5


class Talker(threading.Thread):
    """A client that asks one thing after the other, and notes every answer."""

    def __init__(self, chat: Chat, number: int) -> None:
        super().__init__()
        self.client = chat.connect()
        self.number = number
        self.asked = 0
        self.answers: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        with self.client:
            while not self.over.is_set():
                self.asked += 1
                self.answers.append(self.client.ask(f"echo {self.number}-{self.asked}"))
            self.answers.append(self.client.ask("add"))


def test_restarts_and_failed_upgrades_under_load(chat: Chat) -> None:
    """Nobody is told goodbye, nothing is answered twice or never, nothing runs in two processes."""
    work = {"work": str(chat.work)}
    chat.start(**work)
    talkers = [Talker(chat, number) for number in range(10)]
    with chat.connect() as client:
        assert "1 1" == client.ask("add")  # only what is not new can break a load
        under_load(chat, talkers, work)
        assert "12 2" == client.ask("add")
    answers = sorted(talker.answers[-1] for talker in talkers)
    assert sorted(f"{n} 1" for n in range(2, 12)) == answers
    for talker in talkers:
        asked = [f"{talker.number}-{n}" for n in range(1, talker.asked + 1)]
        assert asked == talker.answers[:-1]
    chat.stop()
    chat.start()
    with chat.connect() as client:
        ticks, turns = map(int, client.ask("work").split())
    assert not (chat.work / "overlap").exists()
    wrote = {name: len(lines(chat.work / name)) for name in ("ticks", "turns")}
    assert {"ticks": ticks, "turns": turns} == wrote
    assert turns > 0


def under_load(chat: Chat, talkers: list[Talker], work: dict[str, str]) -> None:
    for talker in talkers:
        talker.start()
    for number in range(ROUNDS):
        chat.restart(version=2 - number % 2, **work)
        chat.stop()
        chat.fails(**{"break": ["refuse-verify", "die-state", "leave-session"][number % 3]}, **work)
        chat.start(**work)
    for talker in talkers:
        talker.over.set()
    for talker in talkers:
        talker.join(DEADLINE)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_failing_background_task(aio_chat: Chat) -> None:
    """It parks and ends with 1: the next instance has all."""
    aio_chat.start(work=str(aio_chat.work), fails=True)
    with aio_chat.connect() as client:
        assert "1 1" == client.ask("add")
        (aio_chat.work / "now").touch()
        process = aio_chat.service.process
        assert process is not None
        assert 1 == process.wait(DEADLINE)
        assert "background task told to fail" in aio_chat.service.stderr
        aio_chat.service.kill()
        aio_chat.start()

        assert "2 2" == client.ask("add")


def test_a_busy_handler_is_cut(aio_chat: Chat) -> None:
    """It is waited for, then cut, named and counted; the others cross."""
    aio_chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "200ms"
    aio_chat.start()
    with aio_chat.connect() as busy, aio_chat.connect() as client:
        assert "1 1" == client.ask("add")
        assert "holding" == busy.ask("hold")
        status = aio_chat.restart()

        assert (Origin.RESTART, 1) == (status.origin, status.left_behind)
        assert "left behind: unix peer of 'chat': its handler is busy" in aio_chat.service.stderr
        assert "2 2" == client.ask("add")
        assert busy.gone()


@pytest.mark.parametrize(("seconds", "turns"), [(1.5, 1), (3600, 0)])
def test_p4_a_restart_serves_everybody_while_a_turn_runs(
    seconds: float, turns: int, chat: Chat
) -> None:
    """It is waited for up to `drain-timeout`; if it has not ended then, it is cut and counted."""
    chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = f"{min(seconds * 10, 2)}s"
    chat.start()
    process = chat.service.process
    assert process is not None
    with chat.connect() as client:
        assert "begun" == client.ask(f"turn {seconds}")
        begin = last = time.monotonic()
        process.terminate()
        while process.poll() is None:
            with chat.connect() as other, contextlib.suppress(TimeoutError):
                other.sock.settimeout(1)
                assert "x" == other.ask("echo x")
                last = time.monotonic()
        assert last - begin > 0.5  # else none at all is answered
        assert (turns == 0) == ("turn" in chat.service.stderr)
        assert (1 - turns) == chat.start().left_behind
        assert f"0 {turns}" == client.ask("work")


def test_r21_what_keeps_beginning_is_held_first(chat: Chat) -> None:
    """Turns that are longer than `downtime-limit`, of which one runs at any time: they come to an end
    while all others are served, and the upgrade is done."""
    chat.service.environment["UPGRADER_DOWNTIME_LIMIT"] = "500ms"
    chat.start()
    with chat.connect() as client:
        assert "begun" == client.ask("turns 1.2")
        upgrade = chat.service.begin_live(chat.command(version=2))
        assert eventually(lambda: chat.service.describe()["migration"]["phase"] == "collecting")
        assert "x" == client.ask("echo x")
        assert 2 == upgrade.wait().generation
        assert "y" == client.ask("echo y")


def test_an_upgrade_can_be_called_off_while_a_turn_is_waited_for(chat: Chat) -> None:
    """At once, and not after the turn; all are served on."""
    chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "1h"
    chat.service.environment["UPGRADER_MIGRATION_TIMEOUT"] = "3h"
    chat.start()
    with chat.connect() as client:
        assert "begun" == client.ask("turn 3600")
        upgrade = chat.service.begin_live(chat.command(version=2))
        assert eventually(lambda: chat.service.describe()["migration"]["phase"] == "collecting")
        upgrade.abort()
        assert eventually(lambda: chat.service.describe()["last"]["decision"] == "aborted")
        assert "x" == client.ask("echo x")
        assert 1 == chat.service.describe()["generation"]


def test_a_turn_is_closed_although_a_handler_is_busy(aio_chat: Chat) -> None:
    """A thread must not be cut in the middle because some handler used up the time."""
    aio_chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "200ms"
    work = {"work": str(aio_chat.work)}
    for _ in range(3):
        aio_chat.start(**work)
        with aio_chat.connect() as busy:
            assert "holding" == busy.ask("hold")
            assert eventually(lambda: len(lines(aio_chat.work / "turns")) > 5)
            aio_chat.stop()
    aio_chat.start()
    with aio_chat.connect() as client:
        _, turns = map(int, client.ask("work").split())

    assert len(lines(aio_chat.work / "turns")) == turns


def test_fd_numbers_stay(chat: Chat) -> None:
    """Twenty restarts with connections: no FD more than after the second."""
    chat.start()
    with chat.connect() as client, chat.connect() as other:
        second = 0
        for number in range(20):
            chat.restart()
            assert f"{number + 1} {number + 1}" == client.ask("add")
            assert "x" == other.ask("echo x")
            if number == 1:
                chat.service.describe()  # by now all is open
                second = chat.fds

        chat.service.describe()
        assert eventually(lambda: chat.fds <= second), f"{chat.fds} FDs, {second} after the second"
        assert ["upgrader-listener-chat"] == chat.stored


def test_many_idle_connections(chat: Chat) -> None:
    """Two thousand cross, and each has its own state."""
    chat.start()
    with contextlib.ExitStack() as stack:
        clients: list[Client] = []
        for number in range(2000):
            clients.append(stack.enter_context(chat.connect()))
            if number % 100 == 0:
                assert "x" == clients[-1].ask("echo x")
        assert "x" == clients[-1].ask("echo x")  # the last one is accepted, so all are
        assert "1 1" == clients[1000].ask("add")
        status = chat.restart()

        assert (2001, 0) == (status.fds, status.left_behind)
        assert "2 2" == clients[1000].ask("add")
        for client in clients[::97]:
            assert "y" == client.ask("echo y")
        assert "3 1" == clients[-1].ask("add")


@contextlib.contextmanager
def at_a_desk(chat: Chat) -> Iterator[subprocess.Popen[bytes]]:
    environment = {n: v for n, v in os.environ.items() if n != "NOTIFY_SOCKET"}
    process = subprocess.Popen(chat.command(), env=environment, stderr=subprocess.PIPE)
    try:
        assert eventually(chat.reachable)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_a_desk(chat: Chat, number: int) -> None:
    """Without systemd it drains: what is unsent goes out, and handlers say goodbye."""
    with at_a_desk(chat) as process, chat.connect() as client:
        client.send("add\nbig 1000000\n")
        assert "1 1" == client.line()
        assert b"00000000" == client.sock.recv(8, socket.MSG_PEEK)
        process.send_signal(number)
        rest = client.rest()

        assert 1_000_001 == len(rest.removesuffix(b"goodbye\n"))
        assert (chat.face == "aio") == rest.endswith(b"\ngoodbye\n")
        assert 0 == process.wait(DEADLINE)
        assert not chat.path.exists()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_a_handler_that_fails(chat: Chat) -> None:
    """It costs its own connection, is logged, and disturbs nobody."""
    chat.start()
    with chat.connect() as client, chat.connect() as other:
        client.send("fail\n")
        assert client.rest() in (b"", b"goodbye\n")
        assert "x" == other.ask("echo x")
        assert "told to fail" in chat.service.stderr
        assert 0 == chat.restart().left_behind


def test_two_signals_are_one(chat: Chat) -> None:
    """An impatient admin changes nothing."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        process = chat.service.process
        assert process is not None
        for _ in range(5):
            process.send_signal(signal.SIGTERM)
        chat.stop()
        chat.start()

        assert "2 2" == client.ask("add")


def test_somebody_can_be_asked_all_the_while(chat: Chat) -> None:
    """Around a commit as well, however long handlers take to begin anew: whoever comes is answered by the one
    or the other instance."""
    chat.start()
    own, for_all = (chat.service.runtime_directory / name for name in (SOCKET, STATUS_SOCKET))
    assert eventually(lambda: own.exists() and for_all.exists())
    over = threading.Event()
    failures: list[str] = []
    answered: set[int] = set()

    def come(path: Path, question: Callable[[socket.socket], object]) -> None:
        while not over.wait(0.0002):
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(str(path))  # it waits if there is a queue
                    sock.settimeout(DEADLINE)
                    question(sock)
                except OSError as error:
                    failures.append(f"{path}: {error}")

    def describe(sock: socket.socket) -> None:
        answered.add(call(sock, f"{INTERFACE}.Describe", {})["generation"])

    comers = [
        threading.Thread(target=come, args=[own, describe]),
        threading.Thread(target=come, args=[for_all, socket.socket.fileno]),
    ]
    for each in comers:
        each.start()
    try:
        with Client(chat.path) as client:
            client.ask("add")
            for _ in range(ROUNDS):
                assert Origin.LIVE == chat.service.live(chat.command(slow=0.3)).origin
    finally:
        over.set()
        for each in comers:
            each.join()
    assert not failures
    assert {*range(1, ROUNDS + 2)} >= answered >= {1, ROUNDS + 1}


def test_a_module_that_is_missing_for_a_moment(chat: Chat) -> None:
    """A package is unpacked file by file: what answers is loaded a moment later, or there would never be a
    live upgrade again."""
    chat.start(missing="upgrader.instance.control_answers")
    assert 1 == chat.service.describe()["generation"]
    assert "nobody can ask this instance yet" in chat.service.stderr
    assert Origin.LIVE == chat.service.live(chat.command()).origin
