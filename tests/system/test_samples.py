# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sample units as they are shipped: hardened, and upgraded in each mode without losing a connection."""

import re
import socket
from collections.abc import Iterator

import pytest

from tests.pages import ROOT, blocks
from tests.support import SETTLE
from tests.system.serving import Client, network_of
from upgrader.lab.private_systemd import PrivateSystemd

_UNITS = sorted((ROOT / "units").glob("*.service"))
_SHOWN = {"chat.service": 7000, "chat@.service": 7001}


@pytest.fixture
def samples(any_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    """All samples installed, with the program of the README."""
    machine = any_machine
    (program, *_) = blocks(ROOT / "README.md", "python")
    machine.write("/usr/lib/chat/chat.py", program)
    machine.run(["systemd-sysusers", "--inline", "u chat -", "u web -"])
    for unit in (ROOT / "units").iterdir():
        text = unit.read_text().replace("/usr/bin/python3", " ".join(machine.python))
        text = text.replace("ListenStream=7000", "ListenStream=127.0.0.1:7001")
        if machine.tree.name == "host":  # its Python may lie in a home, and a checkout in /tmp
            text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
            text = text.replace("[Service]\n", f"[Service]\nBindReadOnlyPaths=-{ROOT}\n")
        machine.write(f"/etc/systemd/system/{unit.name}", text)
    machine.run(["systemctl", "daemon-reload"])
    yield machine
    names = [unit.name for unit in (ROOT / "units").iterdir()]
    machine.run(["systemctl", "stop", "chat.service", "chat@1.service", "chat.socket"], check=False)
    machine.run(["rm", *(f"/etc/systemd/system/{name}" for name in names)])
    machine.run(["systemctl", "daemon-reload"])


@pytest.mark.parametrize("unit", sorted(_SHOWN))
def test_a_sample_keeps_its_connections(samples: PrivateSystemd, unit: str) -> None:
    """Live, by a restart, and live again; with all that hardens it, and as its own user."""
    name = unit.replace("@", "@1")
    if "@" in unit:
        samples.run(["systemctl", "start", "chat.socket"])
    samples.run(["systemctl", "start", name])
    with network_of(samples):
        sock = socket.create_connection(("127.0.0.1", _SHOWN[unit]), SETTLE)
    with Client(sock) as client:
        assert "1 one" == client.ask("one")
        for number, mode in enumerate(("live", "restart", "live"), 2):
            done = samples.run(["upgrader", "upgrade", "--mode", mode, name], check=False)

            assert 0 == done.returncode, done.stderr
            assert f"{number} more" == client.ask("more")
    assert "chat" == samples.run(["systemctl", "show", "-P", "User", name]).stdout.strip()


@pytest.mark.parametrize("visible", ["ProtectProc=default", "ProtectProc=invisible"])
def test_a_private_user_namespace(samples: PrivateSystemd, visible: str) -> None:
    """PrivateUsers= is no obstacle; with other processes hidden as well, the two instances cannot
    see each other, and without a mode it is upgraded by a restart."""
    unit = "/etc/systemd/system/chat.service"
    text = samples.run(["cat", unit]).stdout
    samples.write(unit, text.replace("ProtectProc=invisible", f"{visible}\nPrivateUsers=yes"))
    samples.run(["systemctl", "daemon-reload"])
    samples.run(["systemctl", "start", "chat.service"])
    said = samples.run(["upgrader", "upgrade", "chat.service"]).stdout

    assert ("by restart" if "invisible" in visible else "by live") in said


def test_a_dynamic_user_is_upgraded_by_a_restart(samples: PrivateSystemd) -> None:
    """The D-Bus daemon turns it away: live mode says so beforehand, and without a mode nothing is
    lost either."""
    unit = "/etc/systemd/system/chat.service"
    text = samples.run(["cat", unit]).stdout
    samples.write(unit, text.replace("User=chat", "DynamicUser=yes\nUser=chat-dynamic"))
    samples.run(["systemctl", "daemon-reload"])
    samples.run(["systemctl", "start", "chat.service"])
    with network_of(samples):
        sock = socket.create_connection(("127.0.0.1", 7000), SETTLE)
    with Client(sock) as client:
        assert "1 one" == client.ask("one")
        refused = samples.run(
            ["upgrader", "upgrade", "--mode", "live", "chat.service"], check=False
        )
        assert 1 == refused.returncode
        assert "dbus-daemon turns its users away" in refused.stderr
        done = samples.run(["upgrader", "upgrade", "chat.service"])
        assert "by restart" in done.stdout
        assert "2 two" == client.ask("two")


@pytest.mark.parametrize("unit", [unit.name for unit in _UNITS])
def test_a_sample_is_hardened(trixie_machine: PrivateSystemd, unit: str) -> None:
    """`systemd-analyze security` calls it OK, or better."""
    machine = trixie_machine
    machine.copy_in(ROOT / "units" / unit, f"/run/samples/{unit}")
    said = machine.run(
        ["systemd-analyze", "security", "--offline=true", f"/run/samples/{unit}"], check=False
    ).stdout
    found = re.search(r"Overall exposure level for .*: ([\d.]+) (\w+)", said)

    assert found is not None, said
    assert found[2] in ("OK", "SAFE"), said
