# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine under a real systemd, by the sample unit: QEMU is upgraded, and the guest goes on."""

import time
from collections.abc import Iterator

import pytest

from tests.system.guests import QEMU, Machine, needs_qemu
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.virtual_machine import pinging

#: A QEMU that gets another machine type than it is told: what an older or newer one may be like.
ANOTHER = f"""#!/bin/sh
for word; do
    shift
    case $word in pc-q35-*,*) word=pc-q35-7.1,${{word#*,}} ;; esac
    set -- "$@" "$word"
done
exec {QEMU} "$@"
"""


@pytest.fixture
def guest(host_machine: PrivateSystemd) -> Iterator[Machine]:
    needs_qemu()
    machine = Machine(host_machine, "small", 96)
    machine.boot()
    yield machine
    machine.remove()


def test_a_machine_goes_on(guest: Machine) -> None:
    """Upgraded live, its guest counts on, and at most two pings are lost. An upgrade to a QEMU that
    cannot load it is refused in QEMU's own words: nothing is left of that, and no ping is lost after it."""
    with pinging(guest.machine) as pings:
        assert guest.counts()
        done = upgrade(guest, "--mode", "live")
        assert 0 == done["exit_code"], done
        assert guest.counts()
    assert len(pings.lost()) <= 2, pings.lost()
    assert pings.longest_gap < 0.5

    guest.machine.write("/srv/guest/qemu", ANOTHER)
    guest.machine.run(["chmod", "755", "/srv/guest/qemu"])
    guest.describe(binary="/srv/guest/qemu")
    before = guest.qemus()
    with pinging(guest.machine) as pings:
        refused = upgrade(guest, "--mode", "live")
        at = time.monotonic()
        assert guest.counts()
    assert 0 != refused["exit_code"]
    assert "load of migration failed" in refused["cause"], refused
    assert before == guest.qemus()
    assert [] == pings.lost(since=at)
    assert len(pings.lost()) <= 2
