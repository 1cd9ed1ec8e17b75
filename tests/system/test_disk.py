# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a storage daemon under a real systemd, which keeps the connection over a restart."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import disk_user
from tests.process.disks import DISK, SPEED, STORAGE, asked, flowing, require_all
from tests.support import cannot_run, eventually
from tests.system.reloading import live, socket_there
from tests.system.serving import Install
from tests.system.tool import status, upgrade
from upgrader.lab.private_systemd import PrivateSystemd

PLACE = "/srv/disk"


@pytest.fixture
def disk(host_machine: PrivateSystemd) -> Iterator[Path]:
    """Where the disk of a daemon is, that is a unit of its own: as seen from here."""
    found = shutil.which(STORAGE)
    if not found:
        cannot_run(f"{STORAGE} is not installed: packaging/bootstrap test")
    machine = host_machine
    machine.copy_in(disk_user.__file__, f"{PLACE}/user.py")
    machine.run(["truncate", "-s", str(DISK), f"{PLACE}/disk.raw"])
    export = "type=vhost-user-blk,id=e,node-name=slow,writable=on,addr.type=unix,addr.path="
    machine.run([
        *("systemd-run", "-q", "--unit=storage", found),
        *("--object", f"throttle-group,id=group,x-iops-total={SPEED}"),
        *("--blockdev", f"driver=file,node-name=file,filename={PLACE}/disk.raw"),
        *("--blockdev", "driver=throttle,node-name=slow,throttle-group=group,file=file"),
        *("--export", f"{export}{PLACE}/sock"),
    ])  # fmt: skip
    place = Path(f"/proc/{machine.pid}/root{PLACE}")
    assert eventually((place / "sock").exists)
    yield place
    machine.run(["systemctl", "stop", "storage"])
    machine.run(["rm", "-r", PLACE])


@pytest.mark.matrix
def test_a_disk_in_every_mode(host_machine: PrivateSystemd, install: Install, disk: Path) -> None:
    """Requests are in flight, and each is answered once."""
    options = json.dumps({"path": f"{PLACE}/sock", "bind": f"unix:{PLACE}/questions"})
    command = " ".join([*host_machine.python, f"{PLACE}/user.py", f"'{options}'"])
    lines = [*live(host_machine, "disks"), "ExecStart=", f"ExecStart={command}"]
    service = install(host_machine, "disks", "holder", *lines)
    assert socket_there(service)
    for mode in ("live", "restart", "exec"):
        assert flowing(disk / "questions")
        said = upgrade(service, "--mode", mode)
        assert ("done", mode) == (said["result"], said["mode"]), said
        assert eventually(service.answers)
    assert flowing(disk / "questions")
    told = {each["name"]: each for each in status(service)["instance"]["backends"]}
    assert re.fullmatch(rf"{PLACE}/sock, \d+ in flight", told["disk"]["text"])
    assert {"id", "inode", "path", "seals"} <= set(told["disk"]["verified"])
    figures = asked(disk / "questions", "finish")
    require_all(figures, disk / "disk.raw")
    assert [21] * 3 == figures["moved"]
