# SPDX-License-Identifier: LGPL-2.1-or-later
"""`systemctl reload` into a new version, old and new side by side, under a real systemd."""

import json

import pytest

from tests.support import eventually
from tests.system.reloading import live, processes, reload, socket_there
from tests.system.serving import Install
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

CONNECTIONS = 3


def test_reloads_move_everything(any_machine: PrivateSystemd, install: Install) -> None:
    """Connections, their state and half a line cross three reloads, a restart after them too, and
    a stop is a stop; the new main process is PID 1's own."""
    service = install(any_machine, "live", "holder", *live(any_machine, "live"))
    with service.clients(CONNECTIONS) as clients:
        assert {(1, 1)} == {(client.add()[0], client.add()[2]) for client in clients}
        for generation in (2, 3, 4):
            assert socket_there(service)
            before = service.pid
            clients[0].send("ad")
            service.environment(ROUND=str(generation))
            assert reload(service)
            assert service.pid != before
            assert Origin.LIVE is service.status.origin
            assert eventually(lambda: [str(service.pid)] == processes(service))
            clients[0].send("d\n")
            count, _, seen = map(int, clients[0].line().split())
            assert (generation + 1, generation) == (count, seen)
        service.restart()
        assert {5} == {client.add()[2] for client in clients}
        service.stop()
        assert {"goodbye"} == {client.line() for client in clients}
    assert "not our child" not in service.messages()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("exit", "has ended before it was ready"),
        ("refusing", "not with me"),
        ("unreadable", "saved as version 2"),
        ("lingering", "no progress within 0.3 s"),
        ("hang", "was not ready in time"),
    ],
)
def test_a_bad_version_changes_nothing(
    any_machine: PrivateSystemd, install: Install, mode: str, reason: str
) -> None:
    """The reload fails and says why, the old instance serves on, and the next good one goes in."""
    more = [*live(any_machine, "bad"), "TimeoutStartSec=4"] if mode == "hang" else []
    service = install(any_machine, "bad", "holder", *(more or live(any_machine, "bad")))
    with service.clients(CONNECTIONS) as clients:
        for client in clients:
            client.add()
        before = service.pid
        assert socket_there(service)
        service.environment(MODE=mode)

        assert not reload(service)

        assert before == service.pid
        assert {(2, 1)} == {(answer[0], answer[2]) for answer in map(_add, clients)}
        assert reason in service.messages(), service.messages()
        assert eventually(lambda: [str(before)] == processes(service))
        service.environment(MODE="good", ROUND="2")
        assert reload(service), service.messages()
        assert {(3, 2)} == {(answer[0], answer[2]) for answer in map(_add, clients)}


def test_a_crash_in_the_first_second(any_machine: PrivateSystemd, install: Install) -> None:
    """A version that passes every check and then crashes is started again with the listener and
    the state of the switchover, and the status says so."""
    more = [*live(any_machine, "insured"), "StandardOutput=journal"]
    service = install(any_machine, "insured", "holder", *more)
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        assert socket_there(service)
        service.environment(MODE="crashing")
        reload(service)
        assert "" == client.line()
    service.until(ActiveState="active", NRestarts="1")
    assert Origin.INSURANCE is service.status.origin
    with service.connect() as client:
        assert (1, 2) == client.add()[:2]


def test_nothing_to_upgrade(any_machine: PrivateSystemd, install: Install) -> None:
    """With nothing changed, a reload is the author's own: no other process, no other generation."""
    service = install(any_machine, "boring", "holder", *live(any_machine, "boring"))
    assert socket_there(service)
    before = service.pid

    assert reload(service)

    assert (before, 1) == (service.pid, service.status.generation)
    assert "asked to reload" in service.messages()


def test_who_is_not_registered_gets_nothing(any_machine: PrivateSystemd, install: Install) -> None:
    """FDs and state go to the process that takeover has registered, not even to another of root."""
    service = install(any_machine, "guarded", "holder", *live(any_machine, "guarded"))
    assert socket_there(service)
    program = (
        "import socket, json\n"
        "from upgrader.protocol.varlink_client import call\n"
        "from upgrader.protocol.varlink import VarlinkError\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect('/run/guarded/upgrader.sock')\n"
        "print(json.dumps(call(sock, 'io.upgrader.Instance.Describe', {})))\n"
        "try:\n"
        "    call(sock, 'io.upgrader.Instance.Migrate', {}, upgrade=True)\n"
        "except VarlinkError as error:\n"
        "    print(error)\n"
    )

    said = any_machine.run([*any_machine.python, "-c", program]).stdout.splitlines()

    assert ("holder", 1) == (json.loads(said[0])["service"], json.loads(said[0])["generation"])
    assert "was not registered by takeover" in said[1]
    assert 1 == service.status.generation


def _add(client: object) -> tuple[int, int, int]:
    return client.add()  # type: ignore[attr-defined, no-any-return]
