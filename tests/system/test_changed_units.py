# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units that an admin has changed under a running instance: it is found, told as it is, and kept."""

import json

from tests.system.reloading import installed, live
from tests.system.serving import Install
from tests.system.tool import upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def test_u5_another_runtime_directory(host_machine: PrivateSystemd, install: Install) -> None:
    """The instance is found at the socket that it made at its start; takeover looks for it in the new
    directory, so that a restart upgrades it, and from then on all is as ever."""
    service = installed(host_machine, install, "moved")
    lines = live(host_machine, "moved")
    others = ("RuntimeDirectory=another", "")
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        for number, other in enumerate(others, 2):
            changed = [other if line.startswith("RuntimeDirectory=") else line for line in lines]
            service.configure(*changed)
            assert service.unit in upgrader(host_machine, "list").stdout
            told = upgrade(service)
            assert ("done", "restart", number) == (
                told["result"],
                told["mode"],
                told["after"]["generation"],
            ), told
            assert (number, number, number) == client.add()
            assert "RuntimeDirectory=" in told["warnings"][0]
        service.configure(*lines)
        assert "restart" == upgrade(service)["mode"]
        assert "live" == upgrade(service)["mode"]
        assert (4, 4, 5) == client.add()


def test_n6_a_unit_whose_file_is_gone(host_machine: PrivateSystemd, install: Install) -> None:
    """It runs on, and is shown; nobody upgrades what systemd could not start again."""
    service = installed(host_machine, install, "orphaned")
    path = f"/etc/systemd/system/{service.unit}"
    host_machine.run(["mv", path, "/root/unit"])
    host_machine.run(["systemctl", "daemon-reload"])
    try:
        pid = service.pid
        assert f"{service.unit}  serving" in upgrader(host_machine, "list").stdout
        told = upgrade(service)
        assert ("failed-old-serves", pid) == (told["result"], service.pid)
        assert "its unit file is gone" in told["cause"]
    finally:
        host_machine.run(["mv", "/root/unit", path])
        host_machine.run(["systemctl", "daemon-reload"])


def test_n6_names_of_one_unit_and_of_none(host_machine: PrivateSystemd, install: Install) -> None:
    """A unit that is named twice is upgraded once; a template is told from its instances, and a hold
    has a reason."""
    service = installed(host_machine, install, "doubled")
    done = upgrader(host_machine, "upgrade", "doubled", service.unit, "--json", "--quiet")
    assert [2] == [each["after"]["generation"] for each in json.loads(done.stdout)]
    template = upgrader(host_machine, "upgrade", "room@.service")
    assert (2, True) == (template.returncode, "'room@*.service'" in template.stderr)
    assert 2 == upgrader(host_machine, "hold", service.unit, "--why", " ").returncode
