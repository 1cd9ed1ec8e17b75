# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine in a private systemd; asserts only what a guest never does: to skip a number or to
count one twice."""

import contextlib
import re
import shlex
import shutil

from tests.pages import ROOT
from tests.support import cannot_run, eventually
from tests.system.serving import Service
from upgrader.lab.guest import NoGuestError, guest, network
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.virtual_machine import GUEST, PREFIX, connect_interface

QEMU = "/usr/bin/qemu-system-x86_64"
#: A QEMU that gets another machine type than it is told: what an older or newer one may be like.
ANOTHER = f"""#!/bin/sh
for word; do
    shift
    case $word in pc-q35-*,*) word=pc-q35-7.1,${{word#*,}} ;; esac
    set -- "$@" "$word"
done
exec {QEMU} "$@"
"""
BOOT = 120.0  # seconds, on a busy machine
#: Pings that may be lost in one upgrade: one or two are, a busy machine loses more; a guest that has
#: become deaf loses a hundred in a second.
LOST = 10


class Machine(Service):
    """`vm@NAME.service` of the samples, with a small guest."""

    def __init__(
        self, machine: PrivateSystemd, name: str, memory: int, *, packaged: bool = False
    ) -> None:
        """`packaged`: by the unit of the package upgrader-qemu, which is installed."""
        self.machine, self.name, self.memory = machine, name, memory
        self.unit = f"vm@{name}.service"
        self.interface = f"vm-{name}"
        self.console = self.inside(f"/run/console-{name}")
        try:
            self._guest = guest().install(machine)
        except NoGuestError as error:
            cannot_run(str(error))
        if packaged:
            drop_in = "[Service]\nEnvironment=UPGRADER_DRAIN_TIMEOUT=1s\n"
            machine.write("/etc/systemd/system/vm@.service.d/short.conf", drop_in)
        else:
            self._install()
        self.describe()
        machine.run(["systemctl", "daemon-reload"])

    def _install(self) -> None:
        machine = self.machine
        text = (ROOT / "units" / "vm@.service").read_text()
        text = text.replace("/usr/bin/python3", " ".join(machine.python))
        # Its Python may lie in a home, and a checkout in /tmp.
        text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
        text = text.replace("[Service]\n", f"[Service]\nBindReadOnlyPaths=-{ROOT}\n", 1)
        text = text.replace("DRAIN_TIMEOUT=80s", "DRAIN_TIMEOUT=1s")
        machine.write("/etc/systemd/system/vm@.service", text)

    def describe(self, *more: str, binary: str = QEMU, memory: int = 0, kind: str = "q35") -> None:
        """Write the command line of its QEMU."""
        words = self._guest.command(
            binary,
            f"{GUEST}/{PREFIX}",
            f"/run/console-{self.name}",
            memory=memory or self.memory,
            machine=kind,
        )
        words = [*words, *network(self.interface), *more]
        text = f'QEMU="{shlex.join(words)}"\n'
        self.machine.write(f"/etc/upgrader/machines/{self.name}.conf", text)

    def boot(self) -> None:
        """Start it, and wait until its guest answers."""
        self.start()
        connect_interface(self.machine, self.interface)
        assert eventually(lambda: self.console.exists() and self.numbers() != [], BOOT)

    def remove(self) -> None:
        """Stop it, and take it away."""
        self.machine.run(["systemctl", "stop", self.unit], check=False)
        self.machine.run(["systemctl", "reset-failed", self.unit], check=False)
        with contextlib.suppress(FileNotFoundError):
            self.inside(f"/var/lib/upgrader/hold/{self.unit}").unlink()
        with contextlib.suppress(FileNotFoundError):
            self.console.unlink()
        places = (
            "/srv/guest",
            f"/var/lib/vm/{self.name}",
            f"/etc/upgrader/machines/{self.name}.conf",
        )
        self.machine.run(["rm", "-rf", *places])

    def said(self) -> str:
        """All that its guest has said."""
        return self.console.read_text(errors="replace")

    def numbers(self) -> list[int]:
        """What it has counted; asserts that each number came once."""
        numbers = [int(number) for number in re.findall(r"^tick (\d+)\r?\n", self.said(), re.M)]
        assert [*range(1, len(numbers) + 1)] == numbers
        return numbers

    def counts(self, more: int = 10) -> bool:
        """Whether it goes on counting, in memory that is what it was."""
        first = len(self.numbers())
        assert eventually(lambda: len(self.numbers()) >= first + more, BOOT)
        return "memory bad" not in self.said()

    def qemus(self) -> list[str]:
        """The processes of the unit that are QEMUs, of those that run, as numbered out here."""
        group = self.show("ControlGroup")[0]
        pids = self.inside(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split()
        return [pid for pid in pids if self._is_qemu(pid)]

    def _is_qemu(self, pid: str) -> bool:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
            return "memory-backend=upgrader-ram" in file.read()
        return False


def needs_qemu() -> None:
    """Skip where it cannot be had."""
    if shutil.which(QEMU) is None:
        cannot_run(f"{QEMU} is not installed: packaging/bootstrap test")
