# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holds are true, whoever did what: after the command, the hook, systemctl, and an admin's own word."""

from pathlib import Path
from typing import Any

import pytest

from tests.system.reloading import installed, reload
from tests.system.serving import PROGRAMS, Install, Service, hook
from tests.system.tool import status, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

GOOD = (PROGRAMS / "holder.py").read_text()
BAD = "raise SystemExit('this version ends at once')\n"


class Held:
    """A service with a program file of its own, and what is said of its hold."""

    def __init__(self, machine: PrivateSystemd, install: Install, name: str, *more: str) -> None:
        self._path = f"/srv/{name}/program.py"
        self.machine = machine
        self.put(GOOD)
        command = f"{' '.join(machine.python)} {self._path}"
        lines = ("ExecStart=", f"ExecStart={command}", *more)
        self.service: Service = installed(machine, install, name, *lines)

    def put(self, program: str) -> None:
        """What lies on disk."""
        beside = f"{self._path}.new"  # renamed over it, as package managers do
        self.machine.write(beside, program)
        self.machine.run(["mv", beside, self._path])

    @property
    def hold(self) -> Any:
        """The hold, as `status` says it."""
        return status(self.service)["hold"]

    @property
    def file(self) -> Path:
        return self.service.inside(f"/var/lib/upgrader/hold/{self.service.unit}")

    def upgrade(self, *arguments: str) -> int:
        """The exit code of an upgrade."""
        return upgrader(self.machine, "upgrade", *arguments, self.service.unit).returncode

    def as_needrestart_asks(self) -> str:
        """What the hook says to a request for which no new version was installed."""
        self.machine.run(["rm", "-rf", "/run/upgrader/hook", "/usr/sbin/policy-rc.d"])
        return hook(self.machine, self.service.unit)


def test_n4_a_reload_by_hand_ends_it(any_machine: PrivateSystemd, install: Install) -> None:
    """A bad `upgrader upgrade`, good code, a successful `systemctl reload`: no hold any more."""
    held = Held(any_machine, install, "byhand")
    held.put(BAD)
    assert 1 == held.upgrade()
    assert "ends at once" in held.hold["cause"]
    assert "left alone, held since" in held.as_needrestart_asks()
    held.put(GOOD + "# newer\n")
    assert reload(held.service)

    assert held.hold is None
    assert f"{held.service.unit}: upgraded in" in held.as_needrestart_asks()


def test_n4_a_start_by_hand_ends_it(trixie_machine: PrivateSystemd, install: Install) -> None:
    """The same after a restart that left nobody serving."""
    held = Held(trixie_machine, install, "started", "Restart=no")
    held.put(BAD)
    assert 3 == held.upgrade("--mode", "restart")
    assert held.hold is not None
    held.put(GOOD)
    held.service.start()

    assert held.hold is None


def test_n4_another_version_on_disk_ends_it(any_machine: PrivateSystemd, install: Install) -> None:
    """What failed is not there any more: whoever restarts the service now starts another version."""
    held = Held(any_machine, install, "replaced")
    held.put(BAD)
    assert 1 == held.upgrade()
    held.put(BAD + "# still bad, which nobody knows yet\n")

    assert held.hold is None
    assert "not upgraded, it serves as before" in held.as_needrestart_asks()
    assert held.hold is not None


def test_n4_a_failing_reload_sets_one(any_machine: PrivateSystemd, install: Install) -> None:
    """It is a fact of the running instance, for no process of root's took part; all readers see it,
    and it can be lifted."""
    held = Held(any_machine, install, "reloaded")
    held.put(BAD)
    assert not reload(held.service)

    assert not held.file.exists()
    assert "has ended before it was ready" in held.hold["cause"]
    assert "has ended before it was ready" in upgrader(any_machine, "list").stdout
    assert "left alone, held since" in held.as_needrestart_asks()
    assert "the hold is lifted" in upgrader(any_machine, "unhold", held.service.unit).stdout
    assert held.hold is None
    assert not reload(held.service)
    assert held.hold is not None
    held.put(GOOD)
    assert held.hold is None


def test_n8_an_admins_hold_lasts_until_it_is_lifted(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """A change freeze: the command and the hook leave the unit alone, also for a new version, and no
    upgrade by other ways ends it."""
    held = Held(any_machine, install, "frozen")
    pid = held.service.pid
    put = upgrader(any_machine, "hold", held.service.unit, "--why", "before the fair")
    assert (0, True) == (put.returncode, "on hold until it is lifted" in put.stdout)
    refused = upgrader(any_machine, "upgrade", held.service.unit)
    assert (4, True) == (refused.returncode, "held by an admin since" in refused.stderr)
    assert "before the fair" in refused.stderr
    any_machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
    assert "left alone, held by an admin" in hook(any_machine, "--installed", held.service.unit)
    assert pid == held.service.pid

    held.put(GOOD + "# newer\n")
    assert reload(held.service)
    assert ("admin", "before the fair") == (held.hold["kind"], held.hold["cause"])
    lifted = upgrader(any_machine, "unhold", held.service.unit)
    assert (0, True) == (lifted.returncode, "the hold is lifted" in lifted.stdout)
    assert 0 == held.upgrade()


@pytest.mark.parametrize("verb", ["hold", "unhold"])
def test_holds_of_units_that_are_not_there(host_machine: PrivateSystemd, verb: str) -> None:
    """A mistyped name is told."""
    why = ["--why", "x"] if verb == "hold" else []
    done = upgrader(host_machine, verb, "nosuch", *why)

    assert (4, True) == (done.returncode, "there is no such unit" in done.stderr)


def test_a9_a_hold_that_cannot_be_written_is_told(
    trixie_machine: PrivateSystemd, install: Install
) -> None:
    """With what failed, and with what to do meanwhile; so is one that cannot be lifted."""
    held = Held(trixie_machine, install, "untold")
    place = "/var/lib/upgrader/hold"
    held.put(BAD)
    trixie_machine.run(["rm", "-rf", place])
    trixie_machine.write(place, "in the way")
    done = upgrader(trixie_machine, "upgrade", "--quiet", held.service.unit)
    trixie_machine.run(["rm", place])

    assert 1 == done.returncode
    assert f"warning: no hold could be put on {held.service.unit}" in done.stderr
    assert "do not let anything restart it" in done.stderr


def test_n6_a_hold_whose_unit_has_gone_is_listed(host_machine: PrivateSystemd) -> None:
    """So that somebody can lift it, which needs no unit."""
    host_machine.run(["systemd-run", "--unit=gone-soon", "sleep", "infinity"])
    put = upgrader(host_machine, "hold", "gone-soon", "--why", "before the fair")
    host_machine.run(["systemctl", "stop", "gone-soon"])

    assert 0 == put.returncode
    rows = upgrader(host_machine, "list").stdout.splitlines()
    (row,) = [row for row in rows if row.startswith("gone-soon.service")]
    assert "not-found" in row
    assert "by an admin: before the fair" in row
    assert 0 == upgrader(host_machine, "unhold", "gone-soon").returncode
    assert "gone-soon" not in upgrader(host_machine, "list").stdout
