# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine in real QEMUs, without a network: its guest counts, and each number comes once."""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import SETTLE, cannot_run, eventually, runs
from upgrader.codes import Code
from upgrader.lab.guest import NoGuestError, guest
from upgrader.programs.qemu import Monitor, QemuError
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError
from upgrader.testing.pid1_bus import Typed

QEMU = "qemu-system-x86_64"
MEMORY = 96  # MiB
BOOT = 60.0  # seconds
#: A QEMU that gets another machine type than it is told: what an older or newer one may be like.
ANOTHER = f"""#!/bin/sh
for word; do
    shift
    case $word in pc-q35-*,*) word=pc-q35-7.1,${{word#*,}} ;; esac
    set -- "$@" "$word"
done
exec {QEMU} "$@"
"""
#: Such a one, which has closed all that it holds some time before it says why, and ends.
SLOW = ANOTHER.replace(
    f'exec {QEMU} "$@"',
    f"""said=$({QEMU} "$@" 2>&1)
status=$?
sleep 0.2
echo "$said" >&2
exit $status""",
)


class MachineService(Service):
    """A unit with KillMode=process, and the console of its machine."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            environment={"UPGRADER_DOWNTIME_LIMIT": "5s", "UPGRADER_DRAIN_TIMEOUT": "1s"}
        )
        self.console = directory / "console"
        self._guest = guest()
        self._disk = directory / "disk"
        with self._disk.open("wb") as file:
            file.truncate(16 << 20)

    def _properties(self) -> Mapping[str, Typed]:
        return {**super()._properties(), "KillMode": ("s", "process")}

    def command(
        self, *more: str, binary: str = QEMU, memory: int = MEMORY, machine: str = "q35"
    ) -> list[str]:
        qemu = self._guest.command(
            binary, "10.0.0.2/24", str(self.console), memory=memory, machine=machine
        )
        qemu += ["-drive", f"file={self._disk},if=virtio,format=raw,cache=none", *more]
        options = ["--adapter", "qemu", "--name", "machine"]
        return [sys.executable, "-m", "upgrader.run", *options, "--", *qemu]

    def numbers(self) -> list[int]:
        """What the guest has counted."""
        lines = self.console.read_text(errors="replace").splitlines()[:-1]
        return [int(line.split()[1]) for line in lines if line.startswith("tick ")]

    def counts(self) -> bool:
        """Whether it goes on, each number came once, and its memory is what it was."""
        first = len(self.numbers())
        assert eventually(lambda: len(self.numbers()) > first + 5)
        numbers = self.numbers()
        assert [*range(1, len(numbers) + 1)] == numbers
        said = self.console.read_text(errors="replace")
        return " bad" not in said

    def writes(self) -> bool:
        """Whether it goes on writing to its disk, and reads what it has written."""
        first = self.console.read_text(errors="replace").count("disk good")
        return eventually(
            lambda: self.console.read_text(errors="replace").count("disk good") > first + 1
        )

    def quit(self) -> None:
        """Have QEMU end."""
        (path,) = self.runtime_directory.glob("qemu-*")

        async def ask() -> None:
            async with Monitor.open(path, SETTLE) as monitor:
                with contextlib.suppress(QemuError):  # it may end before it answers
                    await monitor.ask("quit")

        asyncio.run(ask())

    def qemus(self) -> list[int]:
        """The processes that PID 1 keeps and that run still."""
        kept = [name for name, _ in self.store if ".program." in name]
        return [pid for pid in (int(n.rpartition(".")[2]) for n in kept) if runs(pid)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[MachineService]:
    """One that can be started."""
    if shutil.which(QEMU) is None:
        cannot_run(f"{QEMU} is not installed: packaging/bootstrap test")
    try:
        service = MachineService(tmp_path)
    except NoGuestError as error:
        cannot_run(str(error))
    with service:
        yield service
        if service.process:
            service.stop(for_good=True)


def another_type(directory: Path, text: str = ANOTHER) -> str:
    """A QEMU with another machine."""
    path = directory / QEMU
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_life_of_a_machine(machine: MachineService, tmp_path: Path) -> None:
    """Live upgrades, those that are refused, a restart, a crash of its runner: its guest notices none.
    A stop is the end of it."""
    slow = tmp_path / "slow"
    slow.mkdir()
    machine.start(machine.command())
    assert eventually(lambda: machine.console.exists() and machine.numbers() != [], BOOT)

    before = machine.qemus()
    machine.live(machine.command())
    assert machine.counts()
    assert machine.writes()
    assert eventually(lambda: len(machine.qemus()) == 1)
    assert before != machine.qemus()
    assert "pc-q35-" in Path(f"/proc/{machine.qemus()[0]}/cmdline").read_text()

    for command, said in (
        (machine.command(memory=MEMORY // 2), "-m of"),
        (machine.command(machine="pc"), "its type is pc-q35"),
        (machine.command("-device", "virtio-rng-pci"), "now -device virtio-rng-pci"),
        (machine.command(binary="/nowhere/qemu"), "no such program"),
        (machine.command(binary=another_type(tmp_path)), "Machine type received is"),
        (machine.command(binary=another_type(slow, SLOW)), "Machine type received is"),
        (machine.command(binary="/bin/false"), "has ended with status 1"),
    ):
        before = machine.qemus()
        with pytest.raises(ServiceError) as refused:
            machine.live(command)
        assert said in str(refused.value)
        assert refused.value.code in (Code.VERIFY_FAILED, Code.ENDED_EARLY)
        assert before == machine.qemus()
        assert 1 == len([*machine.runtime_directory.glob("qemu-*")])
    assert machine.counts()
    assert machine.writes()

    machine.environment["UPGRADER_PREFLIGHT"] = "1"
    for command, said in (
        (machine.command(), "preflight passed"),
        (machine.command(binary=another_type(tmp_path)), "Machine type received is"),
    ):
        with pytest.raises(ServiceError, match=said):
            machine.live(command)
        assert before == machine.qemus()
    del machine.environment["UPGRADER_PREFLIGHT"]
    assert machine.counts()

    machine.stop()
    assert machine.counts()  # nobody stops it until the next runner has a QEMU for it
    assert Origin.RESTART is machine.start(machine.command()).origin
    assert machine.counts()
    assert eventually(lambda: len(machine.qemus()) == 1)

    machine.kill()
    assert machine.counts()
    machine.start(machine.command())
    assert machine.counts()
    assert machine.writes()
    assert eventually(lambda: len(machine.qemus()) == 1)

    machine.stop(for_good=True)
    assert eventually(lambda: not machine.qemus())
    assert [] == machine.store
    machine.console.unlink()
    machine.start(machine.command())  # cold, in memory that is empty
    assert eventually(lambda: machine.console.exists() and 1 in machine.numbers(), BOOT)
    assert 1 == len([*machine.runtime_directory.glob("qemu-*")])
    assert machine.process
    machine.quit()  # as a guest that is shut down
    assert 0 == machine.process.wait(SETTLE)
    assert [] == machine.store
