# SPDX-License-Identifier: LGPL-2.1-or-later
"""The collection, by the real ansible: a fleet of three systemds, the canary first."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.packages import ROOT
from tests.system.reloading import live, socket_there
from tests.system.serving import PROGRAMS, Client, Service
from upgrader.lab.private_systemd import PrivateSystemd, TreeError

COLLECTION = ROOT / "packaging" / "ansible"
PLACE = "/opt/rooms/room.py"
GOOD = (PROGRAMS / "holder.py").read_text()
BAD = "raise SystemExit('this version ends at once')\n"
CRASHING = GOOD.replace('os.environ.get("MODE", "good")', '"crashing"')


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, PrivateSystemd]]:
    """Three systemds: that of the machine itself, which is the canary, 257, and the newest one, or
    another one of the machine's own where that cannot be had."""
    with contextlib.ExitStack() as booted:
        found = {
            name: booted.enter_context(PrivateSystemd.boot(tree))
            for name, tree in (("canary", "host"), ("second", "trixie"))
        }
        try:
            found["third"] = booted.enter_context(PrivateSystemd.boot("sid"))
        except TreeError:
            found["third"] = booted.enter_context(PrivateSystemd.boot("host"))
        yield found


class Fleet:
    """An instance of `room@` on each machine, a client of each, and the play of the documentation."""

    def __init__(self, machines: dict[str, PrivateSystemd], place: Path) -> None:
        self.machines = machines
        self._place = place
        (place / "program.py").write_text(GOOD)
        self.rooms = {name: self._room(machine) for name, machine in machines.items()}
        self.clients: list[Client] = []
        self._environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(place / "collections"),
            "ANSIBLE_CONNECTION_PLUGINS": str(Path(__file__).parent / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_DEPRECATION_WARNINGS": "false",
            "ANSIBLE_HOME": str(place / "home"),
        }
        collection = place / "collections" / "ansible_collections" / "upgrader" / "upgrader"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(COLLECTION)
        (block,) = re.findall(
            r"^```yaml\n(.*?)^```", (COLLECTION / "README.md").read_text(), re.MULTILINE | re.DOTALL
        )
        (place / "play.yml").write_text(block)
        hosts = "".join(
            f"{name} ansible_connection=nsenter ansible_nsenter_pid={machine.pid}"
            " ansible_python_interpreter=/usr/bin/python3\n"
            for name, machine in machines.items()
        )
        (place / "inventory").write_text(f"[rooms]\n{hosts}")

    def _room(self, machine: PrivateSystemd) -> Service:
        machine.write(PLACE, GOOD)
        command = f"ExecStart={' '.join(machine.python)} {PLACE}"
        lines = ["ExecStart=", command, *live(machine, "room@1"), "TimeoutStartSec=120"]
        room = Service(machine, "room@1", "holder", lines)
        room.start()
        assert socket_there(room)
        return room

    def connect(self) -> None:
        for room in self.rooms.values():
            client = room.connect()
            self.clients.append(client)
            client.add()

    def count(self) -> list[int]:
        """What each client counts now: it counts on as long as nothing was lost."""
        return [client.add()[0] for client in self.clients]

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """A command of ansible."""
        tool = Path(sys.executable).with_name(command[0])
        return subprocess.run(
            [tool, *command[1:]],
            env=self._environment, cwd=self._place, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    def play(self, program: str, *options: str) -> "subprocess.CompletedProcess[str]":
        """The play with another version of the program."""
        (self._place / "program.py").write_text(program)
        more = json.dumps({"program": str(self._place / "program.py"), "upgrader_soak": 3})
        return self.run("ansible-playbook", "-i", "inventory", "-e", more, *options, "play.yml")

    def report(self) -> list[tuple[str, bool, bool]]:
        """Host, failed, changed; of the last play."""
        path = self._place / "report.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return [(each["host"], each["failed"], each["changed"]) for each in lines]

    def instances(self) -> list[tuple[int, int]]:
        return [(room.pid, room.status.generation) for room in self.rooms.values()]

    def programs(self) -> list[str]:
        """What lies on the disks."""
        return [room.inside(PLACE).read_text() for room in self.rooms.values()]

    def remove(self) -> None:
        for client in self.clients:
            client.close()
        for room in self.rooms.values():
            room.remove()


@pytest.fixture
def fleet(machines: dict[str, PrivateSystemd], tmp_path: Path) -> Iterator[Fleet]:
    """A fleet with a client at each host."""
    made = Fleet(machines, tmp_path)
    try:
        made.connect()
        yield made
    finally:
        made.remove()


def changed(done: "subprocess.CompletedProcess[str]") -> list[int]:
    """Of the recap: changed tasks, host by host."""
    return [
        int(number) for number in re.findall(r"^\w+ +: .*changed=(\d+)", done.stdout, re.MULTILINE)
    ]


def test_n8_a_good_version_goes_through_and_a_bad_one_stops_at_the_canary(fleet: Fleet) -> None:
    """The others were never touched, not even their disks; and what is done is not done twice."""
    second = GOOD + "# 2\n"
    done = fleet.play(second)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert [
        ("canary", False, True),
        ("second", False, True),
        ("third", False, True),
    ] == fleet.report()
    assert [2, 2, 2] == [generation for _, generation in fleet.instances()]
    assert [2, 2, 2] == fleet.count()

    before = fleet.instances()
    again = fleet.play(second)
    assert (0, [0, 0, 0]) == (again.returncode, changed(again)), again.stdout
    assert before == fleet.instances()
    fleet.report()

    bad = fleet.play(BAD)
    assert 2 == bad.returncode, bad.stdout
    assert "not upgraded, it serves as before" in bad.stdout
    assert [("canary", True, False)] == fleet.report()
    assert before == fleet.instances()
    assert [BAD, second, second] == fleet.programs()
    assert [3, 3, 3] == fleet.count()

    fixed = fleet.play(GOOD + "# 3\n")
    assert 0 == fixed.returncode, fixed.stdout + fixed.stderr
    assert [3, 3, 3] == [generation for _, generation in fleet.instances()]
    assert [4, 4, 4] == fleet.count()


def test_n8_a_version_that_crashes_in_the_soak_stops_there_too(fleet: Fleet) -> None:
    """It took over, and systemd brought it back; that is no success for the others to follow."""
    before = fleet.instances()
    crashed = fleet.play(CRASHING)

    assert 2 == crashed.returncode, crashed.stdout
    # Found by the upgrade itself, where the machine is slow, or after the soak.
    told = r"room@1\.service: (process \d+ has ended|generation 2 took over, and has ended at once)"
    assert re.search(told, crashed.stdout), crashed.stdout
    assert before[1:] == fleet.instances()[1:]
    assert [("canary", True)] == [(host, failed) for host, failed, _ in fleet.report()]


def test_n8_a_version_that_crashes_before_anybody_looks(fleet: Fleet) -> None:
    """The command says that it is done, and another instance serves when the host is asked."""
    room = fleet.rooms["canary"]
    slow = "/opt/rooms/slow-upgrader"
    # As on a busy machine: the crash, half a second after the switchover, comes before the answer.
    wait = f"while [ ! -e /run/{room.name}/mark ]; do sleep 0.05; done; sleep 2"
    text = f'#!/bin/sh\nupgrader "$@"; code=$?\n[ "$1" != upgrade ] || {{ {wait}; }}\nexit $code\n'
    room.machine.write(slow, text, mode=0o755)
    room.machine.write(f"{PLACE}.new", CRASHING)
    room.machine.run(["mv", f"{PLACE}.new", PLACE])
    words = ["-i", "inventory", "canary", "-m", "upgrader.upgrader.unit"]
    done = fleet.run("ansible", *words, "-a", f"name=room@1 executable={slow}")

    assert 2 == done.returncode, done.stdout
    assert "generation 2 took over, and has ended at once" in done.stdout


def test_n8_check_mode_and_holds(fleet: Fleet) -> None:
    """With --check, what would be done is told and nothing is; a unit on hold is a failure."""
    room = fleet.rooms["canary"]
    room.inside(PLACE).with_suffix(".new").write_text(GOOD + "# 2\n")
    room.machine.run(["mv", f"{PLACE[:-3]}.new", PLACE])
    ad_hoc = ["-i", "inventory", "canary", "-m", "upgrader.upgrader.unit"]
    before = fleet.instances()
    would = fleet.run("ansible", *ad_hoc, "-a", "name=room@1", "--check")
    assert (0, True) == (would.returncode, '"changed": true' in would.stdout), would.stdout
    assert "would be upgraded in mode live" in would.stdout
    assert before == fleet.instances()

    room.machine.run(["upgrader", "hold", "room@1", "--why", "before the fair"])
    held = fleet.run("ansible", *ad_hoc, "-a", "name=room@1")
    assert (2, True) == (held.returncode, "before the fair" in held.stdout), held.stdout
    seen = fleet.run("ansible", *ad_hoc, "-a", "all=true state=serving")
    assert (2, True) == (seen.returncode, "is on hold" in seen.stdout), seen.stdout
    room.machine.run(["upgrader", "unhold", "room@1"])
    seen = fleet.run("ansible", *ad_hoc, "-a", "all=true state=serving")
    assert (0, True) == (seen.returncode, '"changed": false' in seen.stdout), seen.stdout
    missing = fleet.run("ansible", *ad_hoc, "-a", "name=nosuch")
    assert (2, True) == (missing.returncode, "there is no such unit" in missing.stdout)


def test_the_collection_is_one(tmp_path: Path) -> None:
    """It is built, installed, and documents itself, as any collection does."""
    fleet = Fleet.__new__(Fleet)
    fleet._place = tmp_path
    fleet._environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path / "home")}
    fleet._environment["ANSIBLE_COLLECTIONS_PATH"] = str(tmp_path / "installed")
    built = fleet.run("ansible-galaxy", "collection", "build", str(COLLECTION))
    assert 0 == built.returncode, built.stderr
    (archive,) = tmp_path.glob("upgrader-upgrader-*.tar.gz")
    install = [
        "collection",
        "install",
        "--offline",
        "-p",
        str(tmp_path / "installed"),
        str(archive),
    ]
    assert 0 == fleet.run("ansible-galaxy", *install).returncode
    module = fleet.run("ansible-doc", "--json", "upgrader.upgrader.unit")
    (doc,) = json.loads(module.stdout).values()
    assert {"doc", "examples", "return"} <= {name for name, value in doc.items() if value}
    role = fleet.run("ansible-doc", "-t", "role", "upgrader.upgrader.upgrade")
    assert (0, True) == (role.returncode, "upgrader_soak" in role.stdout), role.stderr
    playbook = ["--syntax-check", "-i", "localhost,", "upgrader.upgrader.rolling"]
    assert 0 == fleet.run("ansible-playbook", *playbook).returncode
