# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backends of other kinds than sockets under a real systemd: in its FD store, and through its jobs."""

import os

from tests.support import cannot_run, eventually
from tests.system.reloading import installed
from tests.system.serving import Install
from tests.system.tool import status, upgrade
from upgrader.lab.private_systemd import PrivateSystemd


def counts(step: int) -> str:
    """What is counted in memory, in two eventfds and in a pipe; the timer has expired, and the device
    has its vnet header."""
    return f"{step} {step} {2 * step} {step} 1 12"


def test_every_sort_of_fd_is_kept(host_machine: PrivateSystemd, install: Install) -> None:
    """systemd tells FDs apart that have one inode; all of it goes on live, by exec, by a restart and
    after a crash, and a stop lets go of it. A worker lives on, and a restart ends it: then it is
    started anew."""
    if not os.path.exists("/dev/net/tun"):
        cannot_run("a TAP device needs /dev/net/tun")
    service = installed(host_machine, install, "kinds", "Environment=BACKENDS=yes", program="kinds")
    with service.connect() as client:
        assert counts(1) == client.ask("count")
        worker = client.ask("worker")
    for step, mode in enumerate(("live", "exec", "restart"), 2):
        said = upgrade(service, "--mode", mode)
        assert ("done", mode) == (said["result"], said["mode"]), said
        with service.connect() as client:
            assert counts(step) == client.ask("count")
            assert (worker != client.ask("worker")) == (mode == "restart")
    told = {each["name"]: each for each in status(service)["instance"]["backends"]}
    assert ["id"] == told["events1"]["verified"]
    assert ("tap", "kinds0") == (told["tap"]["kind"], told["tap"]["text"])
    pid = service.pid
    service.signal("KILL")
    assert eventually(lambda: service.pid not in (0, pid) and service.answers())
    with service.connect() as client:
        assert counts(5) == client.ask("count")
    service.stop()
    assert 0 == service.stored
    assert "kinds0" not in host_machine.run(["cat", "/proc/net/dev"]).stdout
