# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a live upgrade wants KillMode=control-group: what dies when, if a unit with two instances is stopped."""

import pytest

from tests.system.reloading import crowd, live, reload, socket_there
from tests.system.serving import Install
from upgrader.lab.private_systemd import PrivateSystemd


@pytest.mark.parametrize("mode", ["control-group", "mixed"])
def test_u11_who_is_told_of_a_stop(
    any_machine: PrivateSystemd, install: Install, mode: str
) -> None:
    """With control-group both instances end by themselves. With mixed only the main one is told, and
    systemd kills the other one as soon as that has ended: whoever is not main by then is lost."""
    lines = live(any_machine, mode)
    service = install(any_machine, mode, "lively", *lines, "Environment=DRAINS=1")
    with crowd(service) as clients, service.connect() as busy:
        assert socket_there(service)
        busy.send("busy 3600\n")
        source = service.pid
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(2)
        assert service.inside(f"/proc/{source}").exists()  # it drains
        service.configure(*lines, "Environment=DRAINS=1", f"KillMode={mode}")

        service.restart()

        clients.is_served_by(3)
        killed = f"Killing process {source} (" in service.messages()
        assert (mode == "mixed") == killed
        if mode == "mixed":
            assert socket_there(service)
            service.environment(ROUND="3")
            assert not reload(service)
            assert "KillMode=mixed: systemd would not tell both instances to stop" in (
                service.messages()
            )
            clients.is_served_by(3)
