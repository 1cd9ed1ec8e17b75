# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upgrade the QEMU of a running virtual machine again and again, and count what its guest and its network
notice."""

import json
import shlex
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from upgrader.lab.demo.options import DemoError, Options
from upgrader.lab.guest import NoGuestError, guest, network
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.virtual_machine import (
    GUEST,
    PREFIX,
    Console,
    Pings,
    connect_interface,
    pinging,
)
from upgrader.tool.outcome import Tell

SERVICE = "machine.service"
_QEMU = "qemu-system-x86_64"
_INTERFACE = "vm-demo"
_CONSOLE = "/run/console"
_MEMORY = 256  # MiB
_BOOT = 120.0  # seconds
_LOOK = 0.05  # seconds between two looks at the counter
_AROUND = 1.0  # seconds of pings before and after each upgrade


class MachineUpgrade(msgspec.Struct, frozen=True):
    """One upgrade. Times are milliseconds: `reported` is what upgrader says that the machine stood
    still, `ping_gap` the longest time without an answer, `guest_gap` the longest between two numbers of
    the guest's counter, which comes each 50 ms."""

    number: int
    reported: float
    ping_gap: float
    guest_gap: float
    pings: int
    lost: int


class MachineReport(msgspec.Struct, frozen=True):
    """All of them; `failed` says why one was the last, `counter` and `memory` whether the guest has
    counted without a gap, and its memory was right."""

    qemu: str
    upgrades: list[MachineUpgrade]
    counter: bool
    memory: bool
    failed: str = ""

    @property
    def lost(self) -> bool:
        """Whether the guest has noticed more than a pause."""
        return bool(self.failed) or not (self.counter and self.memory)

    def json(self) -> bytes:
        """As one object."""
        return msgspec.json.encode(self)

    def table(self) -> str:
        """For people."""
        head = ("upgrade", "reported", "ping gap", "guest gap", "pings lost")
        lines = [f"{head[0]:>8} {head[1]:>10} {head[2]:>10} {head[3]:>10} {head[4]:>12}"]
        for each in self.upgrades:
            lost = f"{each.lost} of {each.pings}"
            lines.append(
                f"{each.number:>8} {each.reported:>7.0f} ms {each.ping_gap:>7.0f} ms"
                f" {each.guest_gap:>7.0f} ms {lost:>12}"
            )
        counter = "without a gap" if self.counter else "WITH A GAP"
        memory = "right" if self.memory else "WRONG"
        lines.append(f"The guest has counted {counter}, and its memory was {memory}.")
        if self.failed:
            lines.append(f"FAILED: {self.failed}")
        return "\n".join(lines)


def run_machine(options: Options, progress: Tell) -> MachineReport:
    """Boot a small guest in a private systemd, and upgrade its QEMU; raises DemoError and
    PrivateSystemdError, which say nothing about upgrades."""
    qemu = shutil.which(_QEMU)
    if qemu is None:
        raise DemoError(f"{_QEMU} is not here", remedy="Debian: apt-get install qemu-system-x86")
    with PrivateSystemd.boot(options.systemd) as machine:
        return _run(machine, qemu, options, progress)


def _run(machine: PrivateSystemd, qemu: str, options: Options, progress: Tell) -> MachineReport:
    _install(machine, qemu)
    version = machine.run([qemu, "--version"]).stdout.splitlines()[0]
    progress(f"{version}: booting a guest of {_MEMORY} MiB")
    with Console(Path(f"/proc/{machine.pid}/root{_CONSOLE}")) as console:
        machine.run(["systemctl", "start", SERVICE])
        connect_interface(machine, _INTERFACE)
        _wait_for(console, 1, _BOOT)
        upgrades: list[MachineUpgrade] = []
        failed = ""
        for number in range(1, options.upgrades + 1):
            with pinging(machine) as pings:
                time.sleep(_AROUND)
                began = time.monotonic()
                command = ["upgrader", "upgrade", SERVICE, "--mode", options.mode, "--json"]
                done = json.loads(machine.run(command, check=False).stdout)
                time.sleep(_AROUND)
            if done["exit_code"] != 0:
                failed = f"upgrade {number}: {done['cause']}"
                break
            upgrades.append(_figures(number, done, pings, console, began))
            progress(f"upgrade {number} of {options.upgrades}: done")
        _wait_for(console, len(console.numbers) + 5, _BOOT)
        numbers, text = console.numbers, console.text
    counter = numbers == [*range(1, len(numbers) + 1)]
    return MachineReport(version, upgrades, counter, "memory bad" not in text, failed)


def _install(machine: PrivateSystemd, qemu: str) -> None:
    """Install a guest and its unit; raises DemoError."""
    try:
        files = guest()
    except NoGuestError as error:
        raise DemoError(str(error)) from error
    words = files.install(machine).command(qemu, f"{GUEST}/{PREFIX}", _CONSOLE, memory=_MEMORY)
    words = [*words, *network(_INTERFACE)]
    text = (resources.files("upgrader.lab.demo") / "example" / SERVICE).read_text()
    text = text.replace("@PYTHON@", " ".join(machine.python)).replace("@QEMU@", shlex.join(words))
    machine.write(f"/etc/systemd/system/{SERVICE}", text)
    machine.run(["systemctl", "daemon-reload"])


def _figures(
    number: int, done: dict[str, Any], pings: Pings, console: Console, began: float
) -> MachineUpgrade:
    return MachineUpgrade(
        number,
        round((done["pause_seconds"] or 0) * 1e3, 1),
        round(pings.longest_gap * 1e3, 1),
        round(console.longest_gap(began - _AROUND) * 1e3, 1),
        len(pings.sent),
        len(pings.lost()),
    )


def _wait_for(console: Console, count: int, seconds: float) -> None:
    """Wait until the guest has counted so far; raises DemoError."""
    deadline = time.monotonic() + seconds
    while len(console.numbers) < count:
        if time.monotonic() > deadline:
            raise DemoError(f"the guest does not count: {console.text[-300:]}")
        time.sleep(_LOOK)
