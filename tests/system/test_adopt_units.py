# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units as admins write them, adopted: what a program or another drop-in sets is not lost, or it is said."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd

UNIT = "/etc/systemd/system/own.service"
LATER = f"{UNIT}.d/90-mine.conf"
SOCKET = "/run/own/socket"


@pytest.fixture
def own(host_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    program = Path(__file__).with_name("services") / "own_socket.py"
    host_machine.copy_in(program, "/srv/own_socket.py")
    python = " ".join(host_machine.python)
    lines = ["[Service]", f"ExecStart={python} /srv/own_socket.py {SOCKET}", "RuntimeDirectory=own"]
    host_machine.write(UNIT, "\n".join([*lines, ""]))
    host_machine.run(["systemctl", "daemon-reload"])
    host_machine.run(["systemctl", "start", "own"])
    assert eventually(lambda: path(host_machine).exists())
    yield host_machine
    host_machine.run(["systemctl", "stop", "own"])
    host_machine.run(["rm", "-rf", UNIT, f"{UNIT}.d"])
    host_machine.run(["systemctl", "daemon-reload"])


def path(machine: PrivateSystemd) -> Path:
    return inside(machine, SOCKET)


def inside(machine: PrivateSystemd, name: str) -> Path:
    return Path(f"/proc/{machine.pid}/root{name}")


def access(machine: PrivateSystemd) -> tuple[int, int, int]:
    """Who may connect."""
    found = os.stat(path(machine))
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def test_who_may_connect_to_a_path(own: PrivateSystemd) -> None:
    """It is as the program has made it, after a start and a live upgrade."""
    before = access(own)
    assert 0 == upgrader(own, "adopt", "--write", "own").returncode
    own.run(["systemctl", "restart", "own"])
    assert before == access(own)
    assert 0 == upgrader(own, "upgrade", "own").returncode
    assert before == access(own)


def test_a_drop_in_that_wins(own: PrivateSystemd) -> None:
    """Nothing is left of the one that would be undone, and it is said by which."""
    own.run(["mkdir", "-p", f"{UNIT}.d"])
    own.write(LATER, "[Service]\nKillMode=control-group\n")
    own.run(["systemctl", "daemon-reload"])
    adopted = upgrader(own, "adopt", "--write", "--untried", "own")

    assert adopted.returncode == 1
    said = f"(unit-files): KillMode= of the drop-in would be undone by {LATER}"
    assert said in " ".join(adopted.stdout.split())
    assert [Path(LATER).name] == os.listdir(inside(own, f"{UNIT}.d"))
