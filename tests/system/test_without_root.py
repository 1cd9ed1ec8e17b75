# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user who is not root, and whom polkit allows to reload and restart one unit: upgrades it, is told what
became of it, and never gets a restart that nobody has asked for."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import eventually
from tests.system.reloading import installed, live
from tests.system.serving import PROGRAMS, Install, Service
from tests.system.tool import NOBODY
from upgrader.lab.private_systemd import PrivateSystemd

EXAMPLE = Path(__file__).parents[2] / "packaging/polkit/50-upgrader.rules"
GOOD = (PROGRAMS / "holder.py").read_text()
#: As in NOBODY, for a user whom no rule knows.
OTHER = tuple({"--reuid=nobody": "--reuid=daemon"}.get(word, word) for word in NOBODY)


@contextmanager
def polkit(machine: PrivateSystemd, unit: str) -> Iterator[None]:
    """The example of the package, for `nobody` and one unit."""
    rules = EXAMPLE.read_text().replace('subject.isInGroup("deploy")', 'subject.user == "nobody"')
    place = "/etc/polkit-1/rules.d/50-upgrader-test.rules"
    machine.write(place, rules.replace("web.service", unit))
    machine.run(["chmod", "a+r", place])
    machine.run(["systemctl", "restart", "polkit.service"])
    try:
        yield
    finally:
        machine.run(["rm", place])
        machine.run(["systemctl", "stop", "polkit.service"], check=False)


class Deployed:
    """A service with a program file of its own, and a deploy user of it."""

    def __init__(self, machine: PrivateSystemd, install: Install, name: str) -> None:
        self._path = f"/srv/{name}/program.py"
        self.machine = machine
        self.put(GOOD)
        command = f"{' '.join(machine.python)} {self._path}"
        patience = "Environment=UPGRADER_DOWNTIME_LIMIT=20s"
        lines = ("ExecStart=", f"ExecStart={command}", patience)
        self.service: Service = installed(machine, install, name, *lines)
        self.lines = (*live(machine, name), *lines)

    def put(self, program: str) -> None:
        """What lies on disk."""
        self.machine.write(f"{self._path}.new", program)
        self.machine.run(["chmod", "-R", "a+rX", str(Path(self._path).parent)])
        self.machine.run(["mv", f"{self._path}.new", self._path])

    def said(self, *arguments: str, user: tuple[str, ...] = NOBODY) -> tuple[int, str, Any]:
        """The exit code, the result and all of what the upgrade says to a user."""
        words = [*user, "upgrader", "upgrade", self.service.unit, "--json", *arguments]
        done = self.machine.run(words, check=False, timeout=120)
        told = json.loads(done.stdout)
        assert told["exit_code"] == done.returncode, done
        return done.returncode, told["result"], told

    @property
    def stands(self) -> list[str]:
        """What nothing may change that was not asked for."""
        return self.service.show("MainPID", "InvocationID", "ActiveEnterTimestampMonotonic")


@pytest.fixture
def deployed(host_machine: PrivateSystemd, install: Install) -> Iterator[Deployed]:
    service = Deployed(host_machine, install, "deployed")
    with polkit(host_machine, service.service.unit):
        yield service


def test_u8_upgrades_live_and_is_told_the_outcome(deployed: Deployed) -> None:
    """A good version, nothing new, a bad one, a unit file to be read, a unit that cannot be upgraded
    live, and a restart that is asked for by name: each as it is, and clients keep what they have."""
    service = deployed.service
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        before = deployed.stands
        assert (0, "done") == deployed.said()[:2]
        assert before == deployed.stands  # nothing had changed

        deployed.put(GOOD + "# newer\n")
        assert "mode live" in deployed.said("--dry-run")[2]["line"]
        code, result, told = deployed.said()
        assert (0, "done", "live", 2) == (code, result, told["mode"], told["after"]["generation"])
        assert (2, 2, 2) == client.add()

        before = deployed.stands
        deployed.put("raise SystemExit('this version ends at once')\n")
        code, result, told = deployed.said()
        assert (1, "failed-old-serves", "ended-early") == (code, result, told["code"]), told
        assert [] == told["warnings"]
        assert before == deployed.stands
        deployed.put(GOOD + "# newest\n")

        service.write(*deployed.lines, "UMask=0027")
        code, result, told = deployed.said()
        assert (4, "needs-daemon-reload") == (code, result), told
        assert before == deployed.stands
        service.configure(*deployed.lines, "KillMode=process")
        code, result, told = deployed.said()
        assert (77, "no-permission") == (code, result), told
        assert "--mode restart" in told["remedy"]
        assert before == deployed.stands
        for root_only in (("--mode", "exec"), ("--set", "drain-timeout=1s")):
            assert (77, "no-permission") == deployed.said(*root_only)[:2]
        assert before == deployed.stands
        assert (3, 3, 2) == client.add()

        code, result, told = deployed.said("--mode", "restart")
        assert (0, "done", 3) == (code, result, told["after"]["generation"]), told
        assert (4, 4, 3) == client.add()


def test_u8_who_has_no_leave(deployed: Deployed) -> None:
    """Is told so, with an exit code of its own; nothing is touched, and no call to an instance changes
    anything, whatever polkit allows."""
    service = deployed.service
    deployed.put(GOOD + "# newer\n")
    before = deployed.stands
    for arguments in ((), ("--mode", "restart"), ("--mode", "live")):
        code, result, told = deployed.said(*arguments, user=OTHER)
        assert (77, "no-permission") == (code, result), told
        assert "polkit" in told["remedy"]
    for verb in ("cancel", "discard", "unhold"):
        done = deployed.machine.run([*OTHER, "upgrader", verb, service.unit, "--json"], check=False)
        assert json.loads(done.stdout)["result"] in ("no-permission", "done"), done
    assert before == deployed.stands
    shown = deployed.machine.run([*OTHER, "upgrader", "status", service.unit]).stdout
    assert "root is told more" in shown
    assert "another version" in shown


def test_u8_a_tool_that_is_killed_in_the_middle(deployed: Deployed) -> None:
    """The upgrade goes on without it, and whoever asks next is told what serves."""
    service = deployed.service
    go, mark = (service.inside(f"/run/{service.name}/{name}") for name in ("go", "mark"))
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        deployed.put(GOOD + "# newer\n")
        service.environment(MODE="slow", SLOW=f"/run/{service.name}/go")
        words = [*NOBODY, "upgrader", "upgrade", service.unit, "--json"]
        with deployed.machine.popen(words, stdout=subprocess.DEVNULL) as asked:
            assert eventually(mark.exists), service.messages()
            asked.kill()
        assert 75 == deployed.said()[0]  # the job of the one before
        go.touch()
        code, result, told = deployed.said("--wait")
        assert (0, "done", 2) == (code, result, told["after"]["generation"]), told
        assert (2, 2, 2) == client.add()


def test_u8_status_sock_under_a_flood(deployed: Deployed) -> None:
    """Another user connects, asks and reads nothing, as fast as it can: the upgrade is told all the
    same, and root's own socket answers."""
    service = deployed.service
    place = f"/run/{service.name}/status.sock"
    flood = [*OTHER, *deployed.machine.python, "-c", _FLOOD, place]
    with service.connect() as client, deployed.machine.popen(flood) as flooding:
        try:
            assert (1, 1, 1) == client.add()
            deployed.put(GOOD + "# newer\n")
            code, result, told = deployed.said()
            assert (0, "done", 2) == (code, result, told["after"]["generation"]), told
            assert 2 == service.ask("Describe")["generation"]
            assert flooding.poll() is None
            assert (2, 2, 2) == client.add()
        finally:
            flooding.kill()


def test_u8_an_instance_that_hangs(deployed: Deployed) -> None:
    """It is not restarted for that, and the verb ends in time."""
    service = deployed.service
    deployed.put(GOOD + "# newer\n")
    before = deployed.stands
    service.signal("STOP")
    try:
        code, result, told = deployed.said()
    finally:
        service.signal("CONT")
    assert (77, "no-permission") == (code, result), told
    assert "no answer in time" in told["cause"]
    assert before == deployed.stands


_FLOOD = """\
import contextlib, socket, sys, threading
call = b'{"method":"io.upgrader.Instance.Describe","parameters":{}}\\0'
def flood():
    kept = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            sock.connect(sys.argv[1])
            sock.sendall(call * 50)
        kept = [*kept[-20:], sock]
for _ in range(4):
    threading.Thread(target=flood).start()
"""
