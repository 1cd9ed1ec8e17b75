# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live upgrades of a blocking program: the same promises, kept between two turns of its loop."""

import pytest

from tests.support import eventually
from tests.system.reloading import (
    alone,
    crowd,
    kill_after_the_commit,
    live,
    paused,
    reload,
    reload_twice,
    socket_there,
)
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=4s"


@pytest.fixture
def service(host_machine: PrivateSystemd, install: Install) -> Service:
    return install(host_machine, "plain", "blocking", *live(host_machine, "plain"), PATIENT)


def test_reloads_move_everything(any_machine: PrivateSystemd, install: Install) -> None:
    """Connections, their state and half a line cross reloads and a restart; a stop is a stop."""
    service = install(any_machine, "plain", "blocking", *live(any_machine, "plain"))
    with crowd(service) as clients:
        reload_twice(service, clients)
        service.restart()
        clients.is_served_by(4)
        service.stop()
        assert {""} == {client.line() for client in clients.clients}
    service.until(NFileDescriptorStore="0")


def test_a_bad_version_and_a_boring_reload(service: Service) -> None:
    """Neither changes anything; the author's own reload runs between two turns."""
    with crowd(service) as clients:
        assert socket_there(service)
        before = service.pid
        assert reload(service)
        assert "asked to reload" in service.messages()
        service.environment(MODE="exit")

        assert not reload(service)

        assert before == service.pid
        clients.is_served_by(1)


@pytest.mark.parametrize("victim", ["destination", "takeover"])
def test_killed_before_the_commit(service: Service, victim: str) -> None:
    """The loop goes on with its next turn."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            upgrade.signal("KILL", getattr(upgrade, victim))

            assert not upgrade.wait()
        clients.is_served_by(1)
        assert upgrade.source == service.pid
        assert alone(service)


@pytest.mark.parametrize("job", ["restart", "stop"])
def test_a_job_in_the_middle(service: Service, job: str) -> None:
    """A source that is frozen decides first, and then does as it is told."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            service.environment()
            service.machine.run(["systemctl", job, service.unit])
            upgrade.wait()
            if job == "stop":
                assert {""} == {client.line() for client in clients.clients}
        if job == "restart":
            clients.is_served_by(2)
            assert alone(service)
        else:
            service.until(ActiveState="inactive", NFileDescriptorStore="0")


def test_the_destination_dies_right_after_the_commit(service: Service) -> None:
    """The source parks what it still has, and Restart= brings everything back."""
    with crowd(service) as clients:
        kill_after_the_commit(service)
        clients.is_served_by(2)
        assert eventually(lambda: alone(service))
