# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thousands of idle connections cross a restart; what cannot cross is named."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.serving import PROGRAMS, Client, Install, Service, allow_many_fds
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd

MANY = 5000
ROUNDS = 3


@pytest.fixture(autouse=True)
def _many_fds() -> None:
    allow_many_fds(MANY)


@pytest.fixture
def user(any_machine: PrivateSystemd) -> str:
    """A user inside whom no other test run has: the kernel counts FDs in flight by uid, machine or not."""
    any_machine.run(["systemd-sysusers", "--inline", f"u in-flight {1_000_000 + os.getpid()} -"])
    return "User=in-flight"


def _add_all(clients: list[Client]) -> list[tuple[int, ...]]:
    for client in clients:
        client.send("add\n")
    return [tuple(map(int, client.line().split())) for client in clients]


def _restart_seconds(service: Service) -> float:
    begun = time.monotonic()
    service.restart()
    return time.monotonic() - begun


@contextlib.contextmanager
def _asking(service: Service) -> Iterator[list[float]]:
    """Ask PID 1 about a unit all the time; yields a list that gets the longest wait in ms."""
    machine = service.machine
    machine.copy_in(PROGRAMS / "responsive.py", "/opt/upgrader-tests/responsive.py")
    command = [*machine.python, "/opt/upgrader-tests/responsive.py", service.unit]
    longest: list[float] = []
    with machine.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None
        assert "asking\n" == asking.stdout.readline()
        yield longest
        longest.append(float(asking.communicate("\n")[0]))


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_thousands_of_connections(any_machine: PrivateSystemd, install: Install, user: str) -> None:
    """5,000 idle connections cross as one FD in the store, also with User= and the default
    LimitNOFILE=, in about the time of a plain restart, and PID 1 goes on answering."""
    plain = install(any_machine, "none", "holder", f"User={user}")
    service = install(any_machine, "many", "holder", f"User={user}")
    holding_none: list[float] = []
    holding_many: list[float] = []
    with service.clients(MANY) as clients:
        _add_all(clients)
        for _ in range(ROUNDS):
            holding_none.append(_restart_seconds(plain))
            clients[-1].add()  # all that the restart before has left to do is done
            holding_many.append(_restart_seconds(service))
        with _asking(service) as longest:
            service.restart()
        status = service.status
        answers = _add_all(clients)
        stored = service.stored

    ratio = statistics.median(holding_many) / statistics.median(holding_none)
    print(
        f"{any_machine.tree.name}, {user}: restart {statistics.median(holding_many):.3f} s with"
        f" {MANY} connections, {statistics.median(holding_none):.3f} s with none,"
        f" ratio {ratio:.2f}; systemctl show at most {longest[0]:.0f} ms"
    )
    assert {(2, 2 + ROUNDS)} == {(answer[0], answer[2]) for answer in answers[:-1]}
    assert 2 * MANY + ROUNDS == max(answer[1] for answer in answers)
    assert (MANY + 1, 0) == (status.fds, status.left_behind)
    assert 1 == stored
    assert ratio <= 4
    assert longest[0] < 1000


def test_fds_of_another_service_in_flight(
    any_machine: PrivateSystemd, install: Install, user: str
) -> None:
    """Parked FDs count against the limit of their user: what the FDs of another service leave no
    room for is cut, counted and named, the rest crosses."""
    shared = (user, "LimitNOFILE=1000")
    other = install(any_machine, "flown", "holder", *shared)
    service = install(any_machine, "flight", "holder", *shared)
    with other.clients(800) as others, service.clients(800) as clients:
        _add_all(others)
        _add_all(clients)
        other.environment(MODE="exit")
        other.restart(check=False)
        service.restart()
        status = service.status
        alive = sum(1 for client in clients if _is_alive(client))
        other.environment()
        other.until(ActiveState="active")

        assert {"2"} == {client.ask("add").split()[0] for client in others}
    print(f"{any_machine.tree.name}: {alive} of 800 crossed: {status}")
    assert 200 <= alive < 800
    assert (alive + 1, 800 - alive) == (status.fds, status.left_behind)
    assert f"{800 - alive} left behind in all" in service.messages()


def test_starting_with_too_many_in_flight(
    any_machine: PrivateSystemd, install: Install, user: str
) -> None:
    """A service starts even while another one of its user has parked so much that the kernel lets
    it pass no FD to PID 1: it says that its listener would not survive a crash."""
    shared = (user, "LimitNOFILE=500")
    other = install(any_machine, "hoarder", "holder", *shared)
    with other.clients(400) as others:
        _add_all(others)
        other.environment(MODE="exit")
        other.restart(check=False)
        service = install(any_machine, "newcomer", "holder", user, "LimitNOFILE=100")
        with service.connect() as client:
            assert (1, 1, 1) == client.add()
            assert "Too many references" in service.messages()
            # It could park nothing, so a restart is not even begun.
            done = upgrader(any_machine, "upgrade", service.unit, "--mode", "restart", "--json")
            said = json.loads(done.stdout)
            assert (1, "source-failed") == (done.returncode, said["code"]), said
            assert (2, 2, 1) == client.add()
            other.environment()
            other.until(ActiveState="active")
            service.restart()

            assert (3, 3, 2) == client.add()
        assert 1 == service.stored


def test_a_service_that_is_full(any_machine: PrivateSystemd, install: Install) -> None:
    """A service that accepts no more, having as many FDs as its hard limit allows, still parks,
    and the next one has room to load all of it; the backlog is served in turn."""
    service = install(any_machine, "full", "holder", "LimitNOFILE=200")
    with service.clients(300) as clients:
        for client in clients:
            client.send("add\n")
        assert eventually(lambda: "cannot accept" in service.messages())
        for generation in (2, 3, 4):
            service.restart()
            # It has no FD left to be asked with, or to tell the journal.
            show = ["systemctl", "show", "-P", "StatusText", service.unit]
            text = service.machine.run(show).stdout
            told = re.search(r": (\d+) FDs, .* (\d+) left behind", text)
            assert told, text
            assert text.startswith(f"generation {generation}, loaded by restart")
            held, left_behind = int(told[1]) - 1, int(told[2])
            assert 0 == left_behind
            assert 150 < held < 200
        assert {"1"} == {client.line().split()[0] for client in clients[:held]}
        for client in clients[:held]:
            client.close()
        assert {"1 4"} == {"{0} {2}".format(*client.line().split()) for client in clients[held:]}
    assert 1 == service.stored


def _is_alive(client: Client) -> bool:
    try:
        return client.ask("add") != ""
    except BrokenPipeError:
        return False
