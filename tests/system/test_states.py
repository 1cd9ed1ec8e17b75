# SPDX-License-Identifier: LGPL-2.1-or-later
"""State in real upgrades: renamed fields go both ways, and what cannot be saved disturbs nothing."""

import pytest

from tests.support import eventually
from tests.system.reloading import installed
from tests.system.serving import Install
from tests.system.tool import described, found, status, upgrade
from upgrader.lab.private_systemd import PrivateSystemd


@pytest.mark.parametrize("mode", ["live", "restart"])
def test_p6_a_renamed_field_goes_up_and_down(
    mode: str, host_machine: PrivateSystemd, install: Install
) -> None:
    """It counts on, and the outcome of a downgrade names what was dropped, at its depth."""
    service = installed(host_machine, install, f"renamed-{mode}", program="store")
    dropped = "state 'store': values[...].note"
    with service.connect() as client:
        assert "OK" == client.ask("set a 1")
        for number, version in enumerate(("1", "2", "1"), 2):
            service.environment(VERSION=version)
            said = upgrade(service, "--mode", mode)

            assert ("done", mode) == (said["result"], said["mode"])
            assert str(number) == client.ask("count")
            assert ([dropped] if version == "1" else []) == said["after"]["dropped"]
            assert any(dropped in warning for warning in said["warnings"]) == (version == "1")
            assert said["after"]["dropped"] == described(service)["loaded"]["dropped"]
        assert "1" == client.ask("get a")


def test_p5_a_state_that_cannot_be_saved_disturbs_nothing(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """No mode starts the new version; the caller gets the source's own reason, no hold blames the
    version, and `check` and `status` say it as well."""
    service = installed(host_machine, install, "unsavable", program="store")
    hold = service.inside("/var/lib/upgrader/hold/unsavable.service")
    reason = "state 'store' cannot be saved: values['a'].more: "
    with service.connect() as client:
        assert "OK" == client.ask("task a")
        pid = service.pid
        service.environment(VERSION="1")
        for mode in ("live", "restart", "exec"):
            said = upgrade(service, "--mode", mode)

            assert ("failed-old-serves", 1) == (said["result"], said["exit_code"])
            assert reason in said["cause"]
            assert pid == service.pid
            assert not hold.exists()
        said = upgrade(service, "--mode", "live")
        assert "source-failed" == said["code"]
        assert "source-failed" == described(service)["last"]["code"]
        assert any(reason in each["what"] for each in found(service)["findings"])
        (trial,) = status(service)["instance"]["trials"]
        assert trial["problem"].startswith("values['a'].more: ")
        assert reason in service.messages("PRIORITY=3")

        assert "OK" == client.ask("drop a")
        assert "done" == upgrade(service, "--mode", "live")["result"]
        assert "3" == client.ask("count")


def test_p5_a_restart_by_hand_takes_everything_else_along(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """Connections stay; the state that could not be saved is named, and begins anew."""
    service = installed(host_machine, install, "partly", program="store")
    with service.connect() as client:
        assert "OK" == client.ask("task a")
        assert service.restart()

        assert "1" == client.ask("count")
        assert "nil" == client.ask("get a")
    assert eventually(lambda: ["store"] == described(service).get("loaded", {}).get("unsaved"))
    assert "left behind: state of 'store': values['a'].more: " in service.messages("PRIORITY=3")
