# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions that cannot go on with what was there: nothing is lost until a good one is back."""

import subprocess

import pytest

from tests.support import eventually
from tests.system.serving import PROGRAMS, Client, Install, Service, allow_many_fds
from upgrader.lab.private_systemd import PrivateSystemd

# Start attempts of a bad version go on while the store must live (252), slowly enough to see them.
_PATIENT = ("Environment=UPGRADER_LOAD_ATTEMPTS=1000", "RestartSec=100ms")


def _is_kept(service: Service, clients: list[Client], count: int, generation: int) -> None:
    """Every client goes on with its own count, and the count of all is right."""
    answers = [client.add() for client in clients]
    before = len(clients) * (count - 1)

    assert [(count, before + n, generation) for n in range(1, len(clients) + 1)] == answers
    assert 1 == service.stored


@pytest.mark.parametrize("mode", ["exit", "hang", "unreadable", "refusing"])
def test_a_good_version_put_back(any_machine: PrivateSystemd, install: Install, mode: str) -> None:
    """After a version that fails to load in whatever way, the good one has all of it again."""
    service = install(any_machine, f"bad-{mode}", "holder", *_PATIENT, "TimeoutStartSec=1")
    with service.clients(20) as clients:
        for client in clients:
            client.add()
        service.environment(MODE=mode)
        service.restart(check=False)
        assert eventually(lambda: int(service.show("NRestarts")[0]) >= 1)
        service.environment()
        service.until(ActiveState="active")

        _is_kept(service, clients, 2, 2)


def test_a_unit_that_has_failed(trixie_machine: PrivateSystemd, install: Install) -> None:
    """With FileDescriptorStorePreserve=yes all of it outlives the start limit and a stop."""
    service = install(trixie_machine, "failed", "holder", "Restart=no")
    with service.clients(20) as clients:
        for client in clients:
            client.add()
        service.environment(MODE="unreadable")
        service.restart(check=False)
        assert ["failed", "2"] == service.show("ActiveState", "NFileDescriptorStore")
        trixie_machine.run(["systemctl", "stop", service.unit])
        trixie_machine.run(["systemctl", "reset-failed", service.unit])
        trixie_machine.run(["systemctl", "daemon-reload"])
        service.environment()
        service.start()

        _is_kept(service, clients, 2, 2)


def test_an_image_that_no_version_can_load(any_machine: PrivateSystemd, install: Install) -> None:
    """After N attempts the service starts without the image, which is kept aside and named."""
    service = install(any_machine, "hopeless", "holder", "Environment=UPGRADER_LOAD_ATTEMPTS=3")
    with service.connect() as client:
        client.add()
        service.environment(MODE="unreadable")
        service.restart(check=False)
        service.until(ActiveState="active")

        assert "" == client.line()
        assert "3" == service.show("NRestarts")[0]
        assert (1, 2) == (service.status.set_aside, service.status.generation)
    assert 2 == service.stored  # the listener, and the image
    errors = service.messages("PRIORITY=3")
    assert 3 == errors.count("failed to load: IncompatibleState: state 'counters'")
    assert "image of generation 1" in service.messages()
    assert "upgrader-aside-1" in service.messages()
    with service.connect() as other:
        assert (1, 1, 2) == other.add()
        service.restart()

        assert (2, 2, 3) == other.add()
    assert 2 == service.stored


def test_a_destination_killed_while_loading(any_machine: PrivateSystemd, install: Install) -> None:
    """A new instance that is killed after it has loaded everything has consumed nothing."""
    service = install(any_machine, "victim", "holder", *_PATIENT, "RestartSec=200ms")
    with service.clients(500) as clients:
        for client in clients:
            client.add()
        mark = service.inside("/run/victim.mark")
        service.environment(MODE="lingering", MARK="/run/victim.mark")
        any_machine.run(["systemctl", "restart", "--no-block", service.unit])
        for _ in range(3):
            assert eventually(mark.exists)
            mark.unlink()
            service.signal("SIGKILL")
        assert eventually(mark.exists)
        service.environment()
        service.signal("SIGTERM")
        service.until(ActiveState="active")

        _is_kept(service, clients, 2, 2)


def test_a_source_killed_while_parking(any_machine: PrivateSystemd, install: Install) -> None:
    """A source that is killed between two records has parked what it said so far: that lives on,
    the rest is cut, and nothing hangs."""
    count = 5000
    allow_many_fds(count)
    service = install(any_machine, "murdered", "holder")
    any_machine.copy_in(PROGRAMS / "murderer.py", "/opt/upgrader-tests/murderer.py")
    command = [*any_machine.python, "/opt/upgrader-tests/murderer.py", service.unit]
    seen = []
    for delay in (0.0, 0.001, 0.002, 0.003):
        with service.clients(count) as clients:
            for client in clients:
                client.send("add\n")
            total = max(int(client.line().split()[1]) for client in clients)
            with any_machine.popen([*command, str(delay)], stdout=subprocess.PIPE) as murderer:
                assert murderer.stdout is not None
                assert "waiting\n" == murderer.stdout.readline()
                service.restart()
                assert 0 == murderer.wait()
            status = service.status
            alive = [client for client in clients if _answers(client)]
            totals = sorted(int(client.line().split()[1]) for client in alive)
            seen.append((delay, len(alive), status.left_behind))
            if status.source_generation:  # the image was parked: no count is lost
                assert [total + number for number in range(1, len(alive) + 1)] == totals
                assert count == len(alive) + status.left_behind
            else:
                assert not alive
        assert 1 == service.stored
    print(f"{any_machine.tree.name}: (delay, alive, left behind) of {count}: {seen}")


def _answers(client: Client) -> bool:
    """Whether a connection is open; it has been sent one more request then."""
    try:
        client.send("add\n")
        return client.sock.recv(1, 2) != b""  # MSG_PEEK
    except (BrokenPipeError, ConnectionResetError):
        return False
