# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may speak to systemd for a unit: the owner, and nobody that owns nothing yet, or any more."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually
from upgrader.testing import Service, ServiceError

COMMAND = [
    sys.executable,
    str(Path(__file__).parents[1] / "system" / "services" / "speaking.py"),
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(environment={"BIND": f"unix:{tmp_path}/socket"}, timeout=DEADLINE) as service:
        yield service


def test_u4_what_the_owner_says(service: Service, tmp_path: Path) -> None:
    """It reaches systemd, with FDs; what a child says does not."""
    service.start(COMMAND)
    with Client(tmp_path / "socket") as client:
        client.ask("say STATUS=of the owner")
        client.ask("child STATUS=of a child")
        client.ask("store mine")

        assert eventually(lambda: "mine" in [name for name, _ in service.store])
        assert "of the owner" == service.status_text


def test_u4_a_replaced_instance_has_nothing_to_say(service: Service, tmp_path: Path) -> None:
    """What its shutdown says is not the unit's, in a live upgrade; nor what a destination says."""
    service.start(COMMAND)
    with Client(tmp_path / "socket") as client:
        client.ask("say STATUS=first")
        assert eventually(lambda: service.status_text == "first")
        status = service.live(COMMAND)
        assert eventually((service.runtime_directory / "gone").exists)
        assert eventually(lambda: not service.draining)

        assert status.status_text == service.status_text
        assert "2" == client.ask("say STATUS=second")
        assert eventually(lambda: service.status_text == "second")


def test_u4_ready_said_again(service: Service, tmp_path: Path) -> None:
    """As a program says it after each reload of its own: it is the same instance."""
    status = service.start(COMMAND)
    with Client(tmp_path / "socket") as client:
        client.ask("say READY=1")
        client.ask("say STATUS=reloaded")
        assert eventually(lambda: service.status_text == "reloaded")

    assert service.status == status


def test_u4_ready_is_said_by_serve(service: Service) -> None:
    """Start-up code that says it, and fails then, was never ready; its status text is heard."""
    service.environment["FLAW"] = "late"
    with pytest.raises(ServiceError, match="did not become ready"):
        service.start(COMMAND)

    assert "starting" == service.status_text


def test_u4_a_stop_is_heard(service: Service) -> None:
    """What the main process says at its end counts, to the last word."""
    service.start(COMMAND)
    service.stop(for_good=True)

    assert "gone" == service.status_text
