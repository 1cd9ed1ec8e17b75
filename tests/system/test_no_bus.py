# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance that cannot ask systemd: it knows, says so, and nobody is blamed for it."""

import pytest

from tests.system.reloading import installed
from tests.system.serving import Install, Service
from tests.system.tool import described, found, upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd


@pytest.fixture
def deaf(any_machine: PrivateSystemd, install: Install) -> Service:
    """A service without a way to the bus, nor to systemd's own socket."""
    lines = ["User=daemon", "InaccessiblePaths=/run/dbus"]
    return installed(any_machine, install, "deaf", *lines)


def test_u10_an_upgrade_is_a_restart(deaf: Service) -> None:
    """Everything crosses, no version is blamed, and check has said so; a bare reload fails, and
    leaves no hold either."""
    assert ["journal"] == described(deaf)["can"]
    report = found(deaf)
    (limit,) = [each for each in report["findings"] if each["severity"] == "restart-only"]
    assert ("restart", True) == (report["mode"], "cannot ask systemd" in limit["what"])
    with deaf.connect() as client:
        assert (1, 1, 1) == client.add()
        said = upgrade(deaf)
        assert ("done", "restart") == (said["result"], said["mode"])
        assert (2, 2, 2) == client.add()
        assert 0 == upgrader(deaf.machine, "restart", deaf.unit).returncode
        assert (3, 3, 3) == client.add()
        deaf.environment(ROUND="2")
        assert "failed-old-serves" == upgrade(deaf, "--mode", "live")["result"]
        reloaded = deaf.machine.run(["systemctl", "reload", deaf.unit], check=False)
        assert reloaded.returncode != 0
        assert not deaf.inside(f"/var/lib/upgrader/hold/{deaf.unit}").exists()
        assert not [each for each in found(deaf)["findings"] if "on hold" in each["what"]]
        assert (4, 4, 3) == client.add()


def test_u10_a_stop_is_a_stop(deaf: Service) -> None:
    """Clients are refused afterwards, and do not wait for the next start."""
    assert 0 == upgrader(deaf.machine, "restart", deaf.unit).returncode
    with deaf.connect() as client:
        assert (1, 1, 2) == client.add()
        deaf.stop()
        assert "goodbye" == client.line()
        assert "" == client.line()
    assert 0 == deaf.stored
    with pytest.raises(ConnectionRefusedError):
        deaf.connect()
    deaf.start()
    with deaf.connect() as client:
        assert (1, 1, 1) == client.add()
