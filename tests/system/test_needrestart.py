# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real needrestart of both Debians, after a library that services use was replaced."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.system import packages
from tests.system.reloading import installed
from tests.system.serving import Client, Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

_LINKS = "/run/upgrader/needrestart"
_REPLACE = """
set -eu
library=$(echo /usr/lib/python3/dist-packages/msgspec/_core.*.so)
cp -a "$library" "$library.new"
mv "$library.new" "$library"
"""


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateSystemd]:
    """A Debian with our own packages."""
    with packages.booted(request.param, tmp_path_factory.getbasetemp()) as machine:
        machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
        yield machine


@pytest.fixture
def rooms(machine: PrivateSystemd, install: Install) -> Iterator[list[Service]]:
    """Three instances of a template, which the policy has restarted: a bad version is an outage."""
    machine.write("/etc/upgrader/policy.d/room.conf", "room@*.service = restart\n")
    yield [installed(machine, install, f"room@{number}") for number in (1, 2, 3)]
    machine.run(["rm", "-rf", "/etc/upgrader/policy.d/room.conf", "/run/upgrader/hook"])


@pytest.fixture
def clients(rooms: list[Service]) -> Iterator[list[Client]]:
    """A client of each, which has counted once."""
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(room.connect()) for room in rooms]
        for client in clients:
            client.add()
        yield clients


def needrestart(machine: PrivateSystemd, mode: str) -> str:
    """What it said after a library was replaced; `mode`: a (restart), l (list)."""
    machine.run(["sh", "-c", _REPLACE])
    done = machine.run(["needrestart", "-r", mode], timeout=120)
    return done.stdout + done.stderr


def test_n2_a_hold_on_one_instance_keeps_all_of_them_serving(
    machine: PrivateSystemd, rooms: list[Service], clients: list[Client]
) -> None:
    """A bad version lies on disk, and one instance is on hold for it: none is restarted into it."""
    for room in rooms:
        room.environment(MODE="exit")
    rooms[0].hold("bad")
    listed = needrestart(machine, "l")
    said = needrestart(machine, "a")

    assert all(f"{_LINKS}/{room.unit}" in listed for room in rooms), listed
    assert "systemctl restart room@" not in listed + said
    assert f"{rooms[0].unit}: left alone, held since" in said
    for room in rooms[1:]:
        assert f"{room.unit}: left alone, because {rooms[0].unit} is held since" in said
    assert [(2, 2, 1)] * 3 == [client.add() for client in clients]


def test_instances_are_upgraded_one_by_one(
    machine: PrivateSystemd, rooms: list[Service], clients: list[Client]
) -> None:
    """Each by a call of its own, and nobody loses anything."""
    said = needrestart(machine, "a")

    assert all(f"{room.unit}: upgraded in" in said for room in rooms), said
    assert [(2, 2, 2)] * 3 == [client.add() for client in clients]


def test_a_bad_version_stops_at_the_first_instance(
    machine: PrivateSystemd, rooms: list[Service], clients: list[Client]
) -> None:
    """It is restarted into it, and its hold keeps the others as they are."""
    for room in rooms:
        room.environment(MODE="exit")
    said = needrestart(machine, "a")

    assert f"{rooms[0].unit}: not upgraded, NOT SERVING" in said
    assert [(2, 2, 1)] * 2 == [client.add() for client in clients[1:]]
    for room in rooms:
        room.environment()
    rooms[0].restart()


def test_what_an_admin_has_put_in_restart_d_goes_first(
    machine: PrivateSystemd, rooms: list[Service]
) -> None:
    """And so does what other packages have there."""
    own = f"/etc/needrestart/restart.d/{rooms[2].unit}"
    machine.write(own, "#!/bin/sh\necho by hand\n", mode=0o755)
    said = needrestart(machine, "a")
    machine.run(["rm", own])

    assert "by hand" in said
    assert f"{rooms[2].unit}: " not in said
    targets = machine.run(["readlink", f"{_LINKS}/{rooms[2].unit}", f"{_LINKS}/dbus.service"])
    assert [own, "/etc/needrestart/restart.d/dbus.service"] == targets.stdout.split()


def test_when_nobody_answers_what_was_known_counts(
    machine: PrivateSystemd, rooms: list[Service]
) -> None:
    """The links of the last run stay, and a unit that is held has one."""
    needrestart(machine, "l")
    machine.run(["mv", "/usr/bin/upgrader", "/usr/bin/upgrader.aside"])
    machine.write("/usr/bin/upgrader", "#!/bin/sh\nexec sleep 60\n", mode=0o755)
    machine.write("/var/lib/upgrader/hold/other.service", "{}")
    listed = needrestart(machine, "l")
    machine.run(["mv", "/usr/bin/upgrader.aside", "/usr/bin/upgrader"])
    machine.run(["rm", "/var/lib/upgrader/hold/other.service"])

    assert all(f"{_LINKS}/{room.unit}" in listed for room in rooms), listed
    assert 0 == machine.run(["test", "-L", f"{_LINKS}/other.service"]).returncode
