# SPDX-License-Identifier: LGPL-2.1-or-later
"""Install the example service in a private systemd, as a package would, and upgrade it."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Self

from upgrader.lab.demo.options import DemoError, Options
from upgrader.lab.demo.report import FdCount
from upgrader.lab.demo.succession import Departure, describe, main_process, members
from upgrader.lab.demo.waits import Delays
from upgrader.lab.private_systemd import CommandError, PrivateSystemd
from upgrader.protocol.varlink_types import Description

SERVICE = "web.service"
#: The same program with the library switched off: what a restart costs that has nothing to load.
PLAIN = "web-plain.service"
HOST, PORT, PLAIN_PORT = "127.0.0.1", 8080, 8081
VERSIONS = ("1", "2")

_PACKAGE = "/usr/lib/web/web"
_SHARE = "/usr/share/web"
_UNITS = "/etc/systemd/system"
_SWAP = f"""\
#!/bin/sh
# Installs a version of the example service, as a package upgrade would; nothing is restarted.
set -eu
[ -f "{_SHARE}/web${{1-}}.py" ] || {{ echo "usage: web-install VERSION (of those in {_SHARE})" >&2; exit 2; }}
cp "{_SHARE}/web$1.py" {_PACKAGE}/.new
mv {_PACKAGE}/.new {_PACKAGE}/__main__.py
"""
_COUNT_FDS = "for pid; do set -- /proc/$pid/fd/*; echo $#; done"
#: Seconds in which an insurance of a live upgrade leaves the FD store, and then some.
_INSURANCE = 30.0
#: So many equal counts in a row are believed: PID 1 closes a connection some time after its client did.
_SETTLED = 3


class Stage:
    """A booted machine with the example service in it."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self.machine = machine

    @classmethod
    @contextlib.contextmanager
    def set_up(cls, options: Options) -> Iterator["Stage"]:
        """Boot, install version 1, and start it; raises PrivateSystemdError, DemoError."""
        with PrivateSystemd.boot(options.systemd) as machine:
            stage = cls(machine)
            stage._install_all(options.user)
            stage._start(SERVICE)
            yield stage

    def add_version(self, version: str, text: str) -> None:
        """Add a version that can be installed later."""
        self.machine.write(f"{_SHARE}/web{version}.py", text)

    def text(self, version: str) -> str:
        """Return the program of that version."""
        return self.machine.run(["cat", f"{_SHARE}/web{version}.py"]).stdout

    def configure(self, drop_in: str) -> None:
        """Add settings to the unit, without a restart."""
        self.machine.write(f"{_UNITS}/{SERVICE}.d/demo.conf", drop_in)
        self.machine.run(["systemctl", "daemon-reload"])

    def remove_version(self) -> None:
        """Take the program off the disk."""
        self.machine.run(["rm", f"{_PACKAGE}/__main__.py"])

    def install(self, version: str) -> None:
        """Put that version on disk in one step, without a restart."""
        self.machine.run(["web-install", version])

    def start_plain(self) -> None:
        """Start the instance that a plain restart is measured with."""
        self._start(PLAIN)

    def restart_plain(self) -> float:
        """Restart it; return milliseconds from the begin of the stop to READY=1."""
        # Ten restarts in a row are no crash loop: this sets the start limit's counter to 0.
        self.machine.run(["systemctl", "reset-failed", PLAIN])
        self.machine.run(["systemctl", "restart", PLAIN])
        return self.restart_ms(PLAIN)

    def upgrade(self, mode: str) -> "Answer":
        """Upgrade the service with the product's own command."""
        command = ["upgrader", "upgrade", SERVICE, "--mode", mode, "--json"]
        return Answer.of(self.machine.run(command, check=False, timeout=120))

    def departure(self) -> Departure:
        """Watch the instance that serves now; raises DemoError."""
        return Departure(main_process(self.machine, SERVICE))

    def delays(self) -> Delays:
        """Return what sees the processes of the service wait for a CPU; raises DemoError."""
        return Delays(members(self.machine, SERVICE))

    def describe(self) -> Description:
        """Return what the instance that serves says of itself; raises DemoError."""
        return describe(self.machine, SERVICE)

    def show(self, name: str) -> str:
        """Return a property of the service, as PID 1 has it."""
        return self.machine.run(["systemctl", "show", "-P", name, SERVICE]).stdout.strip()

    def stored(self) -> int:
        """Return the number of FDs in the FD store of the service."""
        return int(self.show("NFileDescriptorStore"))

    def restart_ms(self, unit: str = SERVICE) -> float:
        """Return the milliseconds of the last restart by PID 1's timestamps, from the begin of the stop to READY=1."""
        names = "ActiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic"
        shown = self.machine.run(["systemctl", "show", "-p", ",".join(names), unit]).stdout
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return (int(values[names[1]]) - int(values[names[0]])) / 1000

    def count_fds(self, store: int | None = None) -> FdCount:
        """Count the FDs open in the service and in PID 1, once both have closed what they no longer need.

        First wait until the FD store holds `store` of them, because an insurance stays for seconds.
        """
        deadline = time.monotonic() + _INSURANCE
        stored = self.stored()
        while store is not None and stored != store and time.monotonic() < deadline:
            time.sleep(0.2)
            stored = self.stored()
        pid = self.show("MainPID")
        counts: list[FdCount] = []
        for _ in range(20 * _SETTLED):
            lines = self.machine.run(["sh", "-c", _COUNT_FDS, "sh", pid, "1"]).stdout.split()
            counts.append(FdCount(int(lines[0]), int(lines[1]), stored))
            if len(counts) >= _SETTLED and len(set(counts[-_SETTLED:])) == 1:
                break
        return counts[-1]

    def _install_all(self, user: str | None) -> None:
        example = resources.files(f"{__package__}.example")
        unit = _read(example / "web.service")
        unit = unit.replace("@PYTHON@", " ".join(self.machine.python))
        if user:
            self._check_user(user)
            unit = unit.replace("[Service]\n", f"[Service]\nUser={user}\n")
        plain = f"Environment=UPGRADER=off WEB_BIND={HOST}:{PLAIN_PORT}\n"
        machine = self.machine
        machine.write(f"{_UNITS}/{SERVICE}", unit)
        machine.write(f"{_UNITS}/{PLAIN}", unit.replace("[Service]\n", f"[Service]\n{plain}"))
        machine.write(f"{_PACKAGE}/__init__.py", "")
        for module in ("http11.py", "session.py"):
            machine.write(f"{_PACKAGE}/{module}", _read(example / module))
        for version in VERSIONS:
            self.add_version(version, _read(example / f"web{version}.py"))
        machine.write("/usr/local/bin/web-install", _SWAP, mode=0o755)
        self.install(VERSIONS[0])
        machine.run(["systemctl", "daemon-reload"])
        machine.run(["systemctl", "enable", "--quiet", SERVICE])

    def _check_user(self, user: str) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_-]*", user):
            raise DemoError(f"{user!r} is no user name")
        if self.machine.run(["id", user], check=False).returncode != 0:
            raise DemoError(f"there is no user {user!r} inside", remedy="daemon is on every Debian")

    def _start(self, unit: str) -> None:
        try:
            self.machine.run(["systemctl", "start", unit])
        except CommandError as error:
            raise DemoError(
                f"the example service does not start: {error.message}",
                remedy=f"what it said:\n{self.machine.journal(unit=unit, lines=15)}",
            ) from error


@dataclass(frozen=True, slots=True)
class Answer:
    """What `upgrader upgrade --json` said: its exit code, one line, and how long nobody served.

    `pause` is in seconds, by the new instance's own clock; None if there is none.
    """

    exit_code: int
    line: str
    pause: float | None = None

    @classmethod
    def of(cls, done: "subprocess.CompletedProcess[str]") -> Self:
        """Read it from what the command printed."""
        try:
            said = json.loads(done.stdout)
            line = f"{said['line']} ({said['remedy']})" if said["remedy"] else str(said["line"])
            pause = (said["after"] or {}).get("pause")
        except (ValueError, KeyError, TypeError):
            words = (done.stderr or done.stdout).strip().splitlines()
            return cls(done.returncode, words[-1] if words else f"exit code {done.returncode}")
        return cls(done.returncode, line, pause)


def _read(file: Traversable) -> str:
    return file.read_text(encoding="utf-8")
