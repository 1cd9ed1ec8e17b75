# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance that wants another one in its place gets it, in the best way that its unit allows."""

import pytest

from tests.support import eventually
from tests.system.reloading import alone, crowd, live
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin


def ready(service: Service) -> bool:
    """Whether it answers, and knows what it may ask of systemd."""
    return eventually(service.answers)


def test_p11_live(host_machine: PrivateSystemd, install: Install) -> None:
    """Nothing has changed; clients notice nothing, whatever Restart= says."""
    lines = [*live(host_machine, "replaced"), "Restart=no"]
    service = install(host_machine, "replaced", "lively", *lines)
    with crowd(service) as clients, service.connect() as client:
        for generation in (2, 3):
            assert ready(service)
            assert "done" == client.ask("replace")
            assert eventually(lambda: service.status.generation == generation)  # noqa: B023
            assert Origin.LIVE is service.status.origin
            clients.is_served_by(generation)
            assert alone(service)


def test_p11_a_restart_if_it_cannot_be_live(
    trixie_machine: PrivateSystemd, install: Install
) -> None:
    """A job of systemd's, so that Restart= has no part in it."""
    lines = [*live(trixie_machine, "restarted")[1:], "Restart=no"]
    service = install(trixie_machine, "restarted", "lively", *lines)
    with crowd(service) as clients, service.connect() as client:
        assert ready(service)
        assert "done" == client.ask("replace")
        assert eventually(lambda: service.status.generation == 2)
        assert Origin.RESTART is service.status.origin
        clients.is_served_by(2)
    assert ["0"] == service.show("NRestarts")


@pytest.mark.parametrize("restart", ["always", "on-failure"])
def test_p11_without_permission(
    host_machine: PrivateSystemd, install: Install, restart: str
) -> None:
    """systemd takes no wish of this user: it ends, parked, so that Restart= starts the next one."""
    name = f"unasked-{restart}"
    lines = [*live(host_machine, name), f"Restart={restart}", "User=daemon"]
    service = install(host_machine, name, "lively", *lines)
    with crowd(service) as clients, service.connect() as client:
        assert ready(service)
        assert "done" == client.ask("replace")
        assert eventually(lambda: service.show("NRestarts") == ["1"])
        assert eventually(lambda: service.status.generation == 2)
        assert Origin.RESTART is service.status.origin
        clients.is_served_by(2)


def test_p11_nobody_would_start_another(host_machine: PrivateSystemd, install: Install) -> None:
    """Then it serves on, and says why."""
    lines = [*live(host_machine, "lonely"), "Restart=no", "User=daemon"]
    service = install(host_machine, "lonely", "lively", *lines)
    with crowd(service) as clients, service.connect() as client:
        assert ready(service)
        assert "done" == client.ask("replace")
        assert eventually(lambda: "wants to be replaced, and serves on" in service.messages())
        clients.is_served_by(1)


def test_p11_a_bad_version_replaces_nobody(host_machine: PrivateSystemd, install: Install) -> None:
    """If the live upgrade fails, it is not tried by a restart, which would end badly."""
    service = install(host_machine, "wise", "lively", *live(host_machine, "wise"))
    with crowd(service) as clients, service.connect() as client:
        assert ready(service)
        service.environment(FLAW="exit")
        assert "done" == client.ask("replace")
        assert eventually(lambda: "not upgraded, the running instance" in service.messages())
        assert eventually(lambda: service.show("SubState") == ["running"])
        clients.is_served_by(1)
        service.environment()
        assert eventually(
            lambda: client.ask("replace") == "done" and service.ask("Describe")["expected"]
        )
        assert eventually(lambda: service.status.generation == 2)
        clients.is_served_by(2)
