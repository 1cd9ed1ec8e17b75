# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine under a real systemd, by the sample unit: QEMU is upgraded, and the guest goes on."""

import time
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.guests import ANOTHER, LOST, QEMU, Machine, needs_qemu
from tests.system.serving import hook
from tests.system.tool import upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.virtual_machine import pinging

#: What dpkg does: another file takes the place of the one that runs.
REPLACE = f"cp {QEMU} {QEMU}.dpkg-new && echo >>{QEMU}.dpkg-new && mv {QEMU}.dpkg-new {QEMU}"


@pytest.fixture
def guest(host_machine: PrivateSystemd) -> Iterator[Machine]:
    needs_qemu()
    host_machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
    machine = Machine(host_machine, "small", 96)
    machine.boot()
    yield machine
    machine.remove()


def runners(guest: Machine) -> int:
    """How many have a socket for their program in its directory."""
    return guest.machine.run(["ls", f"/run/vm/{guest.name}"]).stdout.count("upgrader-run-")


def test_a_machine_goes_on(guest: Machine) -> None:
    """Upgraded live, its guest counts on, and few pings are lost; a package that replaces QEMU
    has it upgraded by the hook. An upgrade to a QEMU that cannot load it is refused in QEMU's own words, by
    a preflight that nobody needs to ask for, before a restart as well: nothing is left of that, and no
    ping is lost after it."""
    said = upgrader(guest.machine, "check", guest.unit).stdout
    assert "has bound" not in said  # its monitor: the next QEMU has another one
    assert "Restart=" not in said  # a guest that is shut down stays so
    with pinging(guest.machine) as pings:
        assert guest.counts()
        done = upgrader(guest.machine, "upgrade", guest.unit, "--mode", "live")
        assert 0 == done.returncode, done
        assert "preflight passed in " in done.stderr
        assert guest.counts()
    assert len(pings.lost()) <= LOST, pings.lost()
    assert pings.longest_gap < 1

    guest.machine.run(["sh", "-c", REPLACE])
    (before,) = guest.qemus()
    deleted = f"in the old {QEMU}, which is deleted on disk"
    shown = " ".join(upgrader(guest.machine, "status", guest.unit).stdout.split())
    assert f"{deleted}; next: upgrader upgrade {guest.unit}" in shown
    said = hook(guest.machine, "--libraries")
    assert f"{guest.unit}: has loaded what was replaced: {QEMU}" in said
    assert f"{guest.unit}: upgraded" in said, said
    assert guest.counts()
    assert eventually(lambda: len(guest.qemus()) == 1 and guest.qemus() != [before])
    assert "deleted" not in upgrader(guest.machine, "status", guest.unit).stdout

    guest.machine.write("/srv/guest/qemu", ANOTHER)
    guest.machine.run(["chmod", "755", "/srv/guest/qemu"])
    guest.describe(binary="/srv/guest/qemu")
    before = guest.qemus()
    assert eventually(lambda: 1 == runners(guest))
    for options in ((), ("--mode", "restart"), ("--no-preflight",)):
        with pinging(guest.machine) as pings:
            refused = upgrade(guest, *options)
            at = time.monotonic()
            assert guest.counts()
        assert 0 != refused["exit_code"]
        assert "load of migration failed" in refused["cause"], refused
        assert refused["cause"].startswith("preflight: ") is ("--no-preflight" not in options)
        assert before == guest.qemus()
        assert eventually(lambda: 1 == runners(guest))
        assert [] == pings.lost(since=at)
        assert len(pings.lost()) <= LOST
