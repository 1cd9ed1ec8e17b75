# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine in a booted Debian 13, with all of upgrader from its packages, while apt installs
other QEMUs."""

import time
from collections.abc import Iterator

import pytest

from tests.support import cannot_run, eventually
from tests.system import packages
from tests.system.guests import ANOTHER, LOST, QEMU, Machine
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd, TreeError, suites
from upgrader.lab.virtual_machine import pinging

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

MEMORY = 256  # MiB
#: Makes a package of the QEMU that is installed, of a higher version and with another program in it.
_REPACK = f"""
set -eu
cd /
[ -e /repacked ] || {{ dpkg-repack --generate qemu-system-x86; mv /dpkg-repack* /repacked; }}
sed -i "s/^Version: .*/&+$1/" /repacked/DEBIAN/control
cp /srv/new /repacked{QEMU}
chmod 755 /repacked{QEMU}
dpkg-deb -Znone -b /repacked "/debs/qemu_$1.deb" >/dev/null
"""


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSystemd]:
    """Debian 13 with QEMU, and nothing of upgrader."""
    try:
        debs = packages.own_packages("trixie", tmp_path_factory.getbasetemp())
        wanted = (*suites.PACKAGES, "qemu-system-x86", "dpkg-repack")
        tree = suites.fetch("trixie", print, wanted)
    except TreeError as error:
        cannot_run(str(error))
    with PrivateSystemd.boot(tree) as machine:
        machine.run(["rm", "-r", "/usr/lib/python3/dist-packages/upgrader", "/usr/bin/upgrader"])
        for deb in debs.glob("*.deb"):
            machine.copy_in(deb, f"/debs/{deb.name}")
        yield machine


def test_apt_installs_other_qemus(debian: PrivateSystemd) -> None:
    """`apt install upgrader-qemu` gives a unit that works. With a package of a QEMU that cannot load it
    the machine runs on; the next one, with a good QEMU, has it upgraded, live. apt succeeds, and the guest
    notices neither."""

    def apt(*names: str) -> str:
        done = debian.run([*packages.APT, "install", *names], env=packages.QUIET, timeout=300)
        return done.stdout + done.stderr

    listed = debian.run(["sh", "-c", "ls /debs/*.deb"]).stdout.split()
    apt(*(each for each in listed if "-lab_" not in each and "dh-" not in each))
    guest = Machine(debian, "web", MEMORY, packaged=True)
    guest.boot()
    rows = []
    debian.copy_in(f"/proc/{debian.pid}/root{QEMU}", "/srv/good")
    debian.write("/srv/new", ANOTHER.replace(QEMU, "/srv/good"))
    debian.run(["sh", "-c", _REPACK, "sh", "bad"], timeout=120)
    debian.run(["sh", "-c", "cp /srv/good /srv/new && echo >>/srv/new"])
    debian.run(["sh", "-c", _REPACK, "sh", "good"], timeout=120)
    for kind in ("bad", "good"):
        (before,) = guest.qemus()
        with pinging(debian) as pings:
            assert guest.counts()
            said = apt(f"/debs/qemu_{kind}.deb")
            at = time.monotonic()
            assert guest.counts()
        if kind == "good":
            assert f"upgrader: {guest.unit}: upgraded" in said, said
            assert "loaded by live" in said
            assert eventually(lambda before=before: guest.qemus() not in ([before], []))  # type: ignore[misc]
        else:
            assert f"warning: {guest.unit}: not upgraded, it serves as before" in said, said
            assert "load of migration failed" in said
            old = f"in the old {QEMU}, which is deleted on disk, because its upgrade failed"
            assert f"{old}; install one that can go on with it, then: upgrader upgrade" in said
            shown = debian.run(["upgrader", "status", guest.unit]).stdout
            assert old in " ".join(shown.split())
            print(said, shown)
            assert [before] == guest.qemus()
        assert eventually(lambda: len(guest.qemus()) == 1)
        assert [] == pings.lost(since=at)
        assert len(pings.lost()) <= LOST
        lost, gap = len(pings.lost()), f"{pings.longest_gap * 1e3:.0f} ms"
        rows.append((f"a {kind} QEMU", "upgraded" if kind == "good" else "runs on", str(lost), gap))
    guest.remove()
    publish("qemu apt", ("apt installs", "the machine", "pings lost", "ping gap"), rows)
