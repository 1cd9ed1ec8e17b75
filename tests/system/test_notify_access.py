# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may speak for a unit, whatever its NotifyAccess= says."""

from tests.support import eventually
from tests.system.reloading import alone, live, reload, socket_there
from tests.system.serving import Install
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def test_u4_a_replaced_instance_stops_nobody(any_machine: PrivateSystemd, install: Install) -> None:
    """It says STOPPING=1 in its shutdown; with NotifyAccess=all PID 1 would take that for the unit's,
    and kill the new main process at the end of TimeoutStopSec=."""
    lines = [*live(any_machine, "speaking"), "NotifyAccess=all", "TimeoutStopSec=5"]
    service = install(any_machine, "speaking", "speaking", *lines)
    gone = service.inside("/run/speaking/gone")
    with service.connect() as client:
        for generation in (2, 3):
            assert socket_there(service)
            service.environment(ROUND=str(generation))
            assert reload(service), service.messages()
            assert eventually(gone.exists)
            gone.unlink()
            assert alone(service)

            assert ["active", "running"] == service.show("ActiveState", "SubState")
            assert str(generation) == client.ask("say STATUS=mine")
            service.until(StatusText="mine")
    checked = upgrader(any_machine, "check", service.unit)
    assert "NotifyAccess=all" in checked.stdout


def test_u4_ready_is_said_by_serve(host_machine: PrivateSystemd, install: Install) -> None:
    """A start whose own code says READY=1, and fails then, is a failed start."""
    service = install(host_machine, "early", "speaking", *live(host_machine, "early"))
    service.configure(*live(host_machine, "early"), "Restart=no")
    service.environment(FLAW="late")
    assert not service.restart(check=False)
    service.environment()
    assert service.restart(check=False)
