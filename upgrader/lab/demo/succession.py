# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watch from outside who serves: the main process of the unit, its end, and when the next one owns."""

import os
import select
import socket
import threading
import time
from pathlib import Path

import msgspec

from upgrader.lab.demo.options import DemoError
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.fd import Fd
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.protocol.varlink_types import Description

_ANSWER = 5.0  # seconds for one answer of the instance
#: Seconds that an old instance may take to end: longer than any drain of the demonstration.
GONE = 30.0


class Departure:
    """Watches a process by pidfd, and keeps the moment at which it ended."""

    def __init__(self, pid: int) -> None:
        """Watch the process with this PID outside; raises DemoError if there is none."""
        try:
            self._pidfd = Fd(os.pidfd_open(pid))
        except ProcessLookupError:
            raise DemoError(f"process {pid} of the service is gone too early") from None
        self._at: float | None = None
        self._thread = threading.Thread(target=self._watch, name="departure", daemon=True)
        self._thread.start()

    def at(self, seconds: float = GONE) -> float | None:
        """Return when it ended, in seconds since the epoch; None if it has not after `seconds`."""
        self._thread.join(seconds)
        return self._at

    def _watch(self) -> None:
        with self._pidfd:
            poll = select.poll()
            poll.register(self._pidfd.fileno(), select.POLLIN)
            if poll.poll(GONE * 1000):
                self._at = time.time()


def processes(machine: PrivateSystemd, unit: str) -> dict[int, int]:
    """Return the processes of a unit: their PID inside, and the one outside."""
    found = {}
    try:
        listed = members(machine, unit).read_text()
    except (OSError, DemoError):
        return {}
    for number in listed.split():
        if inner := _inner(int(number)):
            found[inner] = int(number)
    return found


def members(machine: PrivateSystemd, unit: str) -> Path:
    """Return the file that lists the processes of a unit, by their PIDs outside; raises DemoError if it has none."""
    group = machine.run(["systemctl", "show", "-P", "ControlGroup", unit]).stdout.strip()
    if not group:
        raise DemoError(f"{unit} has no process")
    return inside(machine, f"/sys/fs/cgroup{group}/cgroup.procs")


def main_process(machine: PrivateSystemd, unit: str) -> int:
    """Return the main process of a unit, by its PID outside; raises DemoError if there is none."""
    pid = int(machine.run(["systemctl", "show", "-P", "MainPID", unit]).stdout)
    try:
        return processes(machine, unit)[pid]
    except KeyError:
        raise DemoError(f"{unit} has no main process") from None


def describe(machine: PrivateSystemd, unit: str) -> Description:
    """Return what the instance says of itself on its socket; raises DemoError."""
    with connect(machine, unit) as sock:
        try:
            return msgspec.convert(call(sock, f"{INTERFACE}.Describe", {}), Description)
        except (OSError, VarlinkError, msgspec.MsgspecError) as error:
            raise DemoError(f"the instance does not answer on its socket: {error}") from error


def connect(machine: PrivateSystemd, unit: str) -> socket.socket:
    """Connect to the instance's socket; raises DemoError."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(_ANSWER)
    try:
        sock.connect(str(inside(machine, f"/run/{unit.removesuffix('.service')}/upgrader.sock")))
    except OSError as error:
        sock.close()
        raise DemoError(f"the instance does not listen on its socket: {error}") from error
    return sock


def inside(machine: PrivateSystemd, path: str) -> Path:
    """Return the absolute `path` inside the machine, as seen from outside."""
    return Path(f"/proc/{machine.pid}/root{path}")


def _inner(pid: int) -> int | None:
    """Return the PID of a process in its own PID namespace; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:"))
