# SPDX-License-Identifier: LGPL-2.1-or-later
"""Idle connections of a listener with `lazy`: no handler before a client says something, and nothing lost."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.chat import Client
from tests.support import eventually
from upgrader.protocol.status_text import Status
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("idle.py")
CLIENTS = 40
#: More than select(2) takes in one process, and than the least channel takes.
MANY = 1600


class Idle:
    """The service of idle.py with clients that have each sent one line."""

    def __init__(self, face: str, lazy: bool, path: Path, *options: str) -> None:
        kind = "lazy" if lazy else "eager"
        self._command = [sys.executable, str(PROGRAM), face, kind, str(path), *options]
        self._path = path
        self.service = Service()
        self.clients: list[Client] = []

    def start(self, clients: int) -> None:
        self.service.start(self._command)
        self.clients = [Client(self._path) for _ in range(clients)]
        assert {"1"} == {client.ask("x").split()[0] for client in self.clients}

    def live(self, *options: str) -> Status:
        return self.service.live([*self._command, *options])

    def restart(self) -> Status:
        return self.service.upgrade(self._command)

    @property
    def open(self) -> int:
        return int(self.service.describe()["connections"])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Idle]]:
    with contextlib.ExitStack() as stack:

        def make(face: str, *options: str, lazy: bool = True, clients: int = CLIENTS) -> Idle:
            idle = Idle(face, lazy, tmp_path / "socket", *options)
            stack.enter_context(idle.service)
            idle.start(clients)
            for client in idle.clients:
                stack.enter_context(client)
            return idle

        yield make


@pytest.mark.parametrize("how", ["live", "restart"])
def test_only_who_speaks_has_a_handler(face: str, how: str, make: Callable[..., Idle]) -> None:
    """What goes with a connection crosses upgrades in which its client said nothing."""
    idle = make(face)
    for generation in (2, 3):
        status = idle.live() if how == "live" else idle.restart()
        assert (generation, CLIENTS + 1, 0) == (status.generation, status.fds, status.left_behind)
        assert CLIENTS == idle.open
    for called, client in enumerate(idle.clients[:5], 1):
        assert f"2 {called} 3" == client.ask("x")
    for client in idle.clients[:5]:
        client.close()
    for client in idle.clients[5:8]:
        client.close()  # without having been heard
    assert eventually(lambda: idle.open == CLIENTS - 8)
    assert (CLIENTS - 8 + 1) == idle.restart().fds
    assert "2 1 4" == idle.clients[-1].ask("x")


def test_half_a_message_and_what_comes_in_the_pause(face: str, make: Callable[..., Idle]) -> None:
    """What has come and is no message yet, and what comes while nobody serves, is answered in turn."""
    idle = make(face)
    idle.clients[0].send("ha")
    assert "2 40 1" == idle.clients[1].ask("x")  # that of the other has come before
    idle.service.stop()
    idle.clients[2].send("x\n")
    idle.service.start(idle._command)
    idle.clients[0].send("lf\n")

    assert "2" == idle.clients[2].line().split()[0]
    assert "2" == idle.clients[0].line().split()[0]


def test_a_version_that_refuses(face: str, make: Callable[..., Idle]) -> None:
    """The instance before hears them again, of which it had no handler for most."""
    idle = make(face)
    idle.live()
    assert "2 1 2" == idle.clients[0].ask("x")
    with pytest.raises(ServiceError, match="as told"):
        idle.live("refuse")

    assert "3 1 2" == idle.clients[0].ask("x")
    assert "2 2 2" == idle.clients[1].ask("x")
    idle.live()
    assert "3 1 3" == idle.clients[1].ask("x")
    assert "2 2 3" == idle.clients[2].ask("x")


def test_a_library_that_knows_no_crowds(face: str, make: Callable[..., Idle]) -> None:
    """It gets its connections as ever, from and to one that does."""
    idle = make(face)
    for generation, options in ((2, ()), (3, ["older"]), (4, ())):
        status = idle.live(*options)
        assert (generation, CLIENTS + 1, 0) == (status.generation, status.fds, status.left_behind)
    assert {"2"} == {client.ask("x").split()[0] for client in idle.clients}


def test_all_peers(make: Callable[..., Idle], face: str) -> None:
    """Whoever looks at all peers has all of them: on asyncio, each with its handler."""
    idle = make(face)
    idle.live()
    idle.clients[0].send("all\n")

    assert {"to all"} == {client.line() for client in idle.clients}
    assert f"2 {CLIENTS if face == 'aio' else 2} 2" == idle.clients[1].ask("x")


def test_a_stop_for_good(make: Callable[..., Idle], face: str) -> None:
    """All see the end."""
    idle = make(face)
    idle.live()
    assert "2 1 2" == idle.clients[0].ask("x")
    idle.service.stop(for_good=True)

    assert all(client.gone() for client in idle.clients)


@pytest.mark.parametrize("lazy", [True, False])
def test_more_than_a_thousand(make: Callable[..., Idle], lazy: bool) -> None:
    """Those that are heard at once and those that are not may speak in any order."""
    idle = make("aio", lazy=lazy, clients=MANY)
    idle.live()
    for client in idle.clients:
        client.send("x\n")
    answers = [client.line().split() for client in idle.clients]

    assert {("2", "2")} == {(count, generation) for count, _, generation in answers}
    idle.restart()
    assert f"3 {1 if lazy else MANY} 3" == idle.clients[-1].ask("x")


def test_more_than_fits_one_channel(make: Callable[..., Idle]) -> None:
    """The image goes on in further entries of the FD store, which go with it."""
    idle = make("aio", "small", clients=MANY)
    idle.service.stop()
    further = [
        name for name, _ in idle.service.store if name.startswith("upgrader-entry-channel.1.")
    ]
    assert further
    status = idle.service.start(idle._command)

    assert (MANY + 1, 0) == (status.fds, status.left_behind)
    assert eventually(lambda: all("channel" not in name for name, _ in idle.service.store))
    for client in idle.clients:
        client.send("x\n")
    assert {("2", "2")} == {tuple(client.line().split()[::2]) for client in idle.clients}
