# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs with --user: a service of an unprivileged user under that user's own systemd."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import eventually
from tests.system.serving import PROGRAMS, Client, network_of
from upgrader.lab.private_systemd import PrivateSystemd

UID = 1234
RUNTIME = f"/run/user/{UID}"
PORT = 6990
AS_USER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
# useradd(8) is not in a minimal tree.
ADD_USER = f"""
grep -q ^someone: /etc/passwd && exit
echo 'someone:x:{UID}:{UID}::/home/someone:/bin/sh' >> /etc/passwd
echo 'someone:x:{UID}:' >> /etc/group
echo 'someone:*:20000::::::' >> /etc/shadow
mkdir -p /home/someone && chown {UID}:{UID} /home/someone
"""
# What a distribution ships, and a minimal tree lacks.
BUS = """\
[Unit]
Requires=dbus.socket
[Service]
Type=notify
NotifyAccess=main
ExecStart=dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation
"""
UNIT = """\
[Service]
Type=notify
NotifyAccess=exec
FileDescriptorStoreMax=16
FileDescriptorStorePreserve=yes
ExecStart={python} /opt/user-holder.py
ExecReload={python} -m upgrader.takeover
Restart=always
RuntimeDirectory=mine
RuntimeDirectoryPreserve=restart
Environment=PORT={port}
EnvironmentFile=-/tmp/mine.env
[Install]
WantedBy=default.target
"""


class Desk:
    """A user who is logged in, with a session of systemd."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self.machine = machine
        self.environment = {"XDG_RUNTIME_DIR": RUNTIME, "HOME": "/home/someone"}

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self.machine.run([*AS_USER, *command], check=check, env=self.environment)

    def upgrader(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run("upgrader", arguments[0], "--user", *arguments[1:], check=False)

    def status(self) -> Any:
        return json.loads(self.upgrader("status", "mine", "--json").stdout)

    def next_version(self, **variables: str) -> None:
        """What the next start gets as its environment."""
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        self.machine.write("/tmp/mine.env", text)


@pytest.fixture(scope="module")
def desk(trixie_machine: PrivateSystemd) -> Iterator[Desk]:
    """A user with a session, and a service of that user."""
    machine = trixie_machine
    machine.run(["sh", "-c", ADD_USER])
    drop_in = f"/etc/systemd/system/user@{UID}.service.d/session.conf"
    machine.write(drop_in, f"[Service]\nEnvironment=XDG_RUNTIME_DIR={RUNTIME}\n")
    machine.write("/etc/systemd/user/dbus.socket", "[Socket]\nListenStream=%t/bus\n")
    machine.write("/etc/systemd/user/dbus.service", BUS)
    machine.copy_in(PROGRAMS / "holder.py", "/opt/user-holder.py")
    python = shlex.join(machine.python)
    machine.write("/etc/systemd/user/mine.service", UNIT.format(python=python, port=PORT))
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "start", f"user@{UID}.service"])
    made = Desk(machine)
    made.run("systemctl", "--user", "start", "dbus.socket", "dbus.service")
    made.run("systemctl", "--user", "enable", "--now", "mine")
    yield made
    machine.run(["systemctl", "stop", f"user@{UID}.service"])
    machine.run(["rm", "-rf", drop_in, "/etc/systemd/user/mine.service", "/tmp/mine.env"])
    machine.run(["systemctl", "daemon-reload"])


def connect(desk: Desk) -> Client:
    with network_of(desk.machine):
        import socket

        return Client(socket.create_connection(("127.0.0.1", PORT), 20))


def test_the_verbs_below_a_user_s_own_systemd(desk: Desk) -> None:
    """A user sees, steers and upgrades the own service without root; a failed upgrade leaves a hold
    in the user's own files; the system's systemd knows nothing of it."""
    assert eventually(lambda: desk.status()["instance"] is not None)
    assert "mine.service  serving" in desk.upgrader("list").stdout
    assert "mine.service" not in desk.machine.run(["upgrader", "list"]).stdout
    assert 4 == desk.run("upgrader", "status", "mine", check=False).returncode
    checked = desk.upgrader("check", "mine")
    assert (0, "mine.service: can be upgraded live\n") == (checked.returncode, checked.stdout)
    done = desk.upgrader("set", "mine", "drain-timeout=7s")
    assert (0, "7s") == (done.returncode, desk.status()["instance"]["parameters"]["drain-timeout"])
    assert 1 == desk.upgrader("cancel", "mine").returncode
    with connect(desk) as client:
        assert (1, 1, 1) == client.add()
        desk.next_version(ROUND="2")
        done = desk.upgrader("upgrade", "mine")
        assert (0, True) == (done.returncode, "loaded by live from" in done.stdout), done.stderr
        assert (2, 2, 2) == client.add()
        desk.next_version(MODE="refusing")
        done = desk.upgrader("upgrade", "mine")
        assert (1, True) == (done.returncode, "it serves as before" in done.stderr), done.stderr
        assert "not with me" in desk.status()["hold"]["cause"]
        assert desk.run("ls", "/home/someone/.local/state/upgrader/hold").stdout == "mine.service\n"
        desk.next_version(ROUND="3")
        assert 0 == desk.upgrader("upgrade", "mine", "--mode", "restart").returncode
        assert (3, 3, 3) == client.add()
        assert desk.status()["hold"] is None
        assert 0 == desk.upgrader("upgrade", "mine", "--mode", "exec").returncode
        assert (4, 4, 4) == client.add()
        assert 'unit="mine.service"' in desk.upgrader("status", "--prometheus").stdout
