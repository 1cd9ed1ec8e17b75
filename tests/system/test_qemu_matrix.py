# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual machines in QEMU 7.2, 10.0 and 11.1, from one to the next, and through what goes wrong, while
they are pinged a hundred times a second."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import eventually
from tests.system.guests import ANOTHER, BOOT, LOST, QEMU, Machine, needs_qemu
from tests.system.serving import network_of
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.guest import Guest, network
from upgrader.lab.guest import guest as guest_files
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.private_systemd.errors import TreeError
from upgrader.lab.private_systemd.suites import fetch
from upgrader.lab.virtual_machine import PERIOD, PREFIX, Pings, connect_interface, pinging
from upgrader.programs.qemu import Machine as Description
from upgrader.programs.qemu import Monitor, Placing, QemuError, tap
from upgrader.programs.qemu.shared import make_memory
from upgrader.programs.qemu.versions import versioned

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

MEMORY = 512  # MiB
TIMES = 5
ROUNDS = 10  #: of an upgrade by hand and one by upgrader, each second one the other way round
OFTEN = 0.002  # seconds between two pings there: a gap is not told more exactly
RATIO = 1.3  # of the ping gaps in the middle of them, to those by hand in the same run
MOST = 2  # pings that are lost in one upgrade
#: Whose QEMU is run: that of this machine (7.2 on Debian 12), of Debian 13 and of sid.
SUITES = ("host", "trixie", "sid")
_LOADER = "lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


def binary(machine: PrivateSystemd, suite: str) -> str:
    """The QEMU of a suite as a path in a machine: a tree has its own libraries."""
    if suite == "host":
        return QEMU
    try:
        tree = fetch(suite, print, ("qemu-system-x86",))
    except TreeError as error:
        pytest.skip(str(error))
    place = f"/srv/{suite}/qemu-system-x86_64"
    command = f"{tree}/{_LOADER} --library-path {tree}/{_LIBRARIES} {tree}{QEMU}"
    firmware = f"-L {tree}/usr/share/qemu -L {tree}/usr/share/seabios"
    machine.write(place, f'#!/bin/sh\nexec {command} {firmware} "$@"\n')
    machine.run(["chmod", "755", place])
    return place


@contextlib.contextmanager
def booted(machine: PrivateSystemd, suite: str, kind: str = "q35") -> Iterator[Machine]:
    """A guest in the QEMU of a suite."""
    needs_qemu()
    guest = Machine(machine, "large", MEMORY)
    try:
        guest.describe(binary=binary(machine, suite), kind=kind)
        guest.boot()
        yield guest
    finally:
        guest.remove()


@contextlib.contextmanager
def watched(guest: Machine, period: float = PERIOD) -> Iterator[Pings]:
    """Pings before, during and after something; the guest counts in the end."""
    with pinging(guest.machine, period=period) as pings:
        assert guest.counts(3)
        yield pings
        assert guest.counts()


HAND = ("10.78.0.1", "10.78.0.2")  #: its network


class ByHand:
    """The same guest in QEMUs that are driven over QMP as its manual says, without upgrader: memory shared,
    `x-ignore-shared`, a UNIX socket, and the interface set right while the second QEMU starts."""

    def __init__(self, machine: PrivateSystemd, files: Guest, directory: Path) -> None:
        self.console = directory / "console"
        words = files.command(QEMU, f"{HAND[1]}/{PREFIX}", str(self.console), memory=MEMORY)
        words += network("vm-hand")
        self._machine = Description.read(words)
        self._directory = directory
        self._count = itertools.count()
        self._memory = make_memory(self._machine.memory)
        self._kind = versioned(QEMU, self._machine.type)
        with network_of(machine):
            self._tap = tap.open_tap("vm-hand")
        connect_interface(machine, "vm-hand", HAND[0])
        self._process, self._path = self._start(incoming=False)

    def _start(self, *, incoming: bool) -> tuple[subprocess.Popen[bytes], Path]:
        path = self._directory / f"{next(self._count)}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            fds = (self._memory.fileno(), listener.fileno(), self._tap.fileno())
            devices = {each.interface: fds[2] for each in self._machine.taps}
            placing = Placing(path.stem, fds[0], fds[1], devices)
            words = self._machine.command(self._kind, placing)
            words += ["-incoming", "defer"] if incoming else []
            return subprocess.Popen(words, pass_fds=fds, stdin=subprocess.DEVNULL), path

    def counts(self, more: int) -> bool:
        """Whether its guest goes on."""

        def seen() -> int:
            return self.console.read_text(errors="replace").count("tick ")

        assert eventually(self.console.exists)
        first = seen()
        return eventually(lambda: seen() >= first + more, BOOT)

    @property
    def pids(self) -> list[str]:
        """Its processes."""
        return [str(self._process.pid)]

    def upgrade(self) -> None:
        """Have the machine go on in another QEMU."""
        device = {self._tap: tap.settings(self._machine.taps[0].interface, self._tap)}
        with tap.guarded(device):
            process, path = self._start(incoming=True)
            asyncio.run(self._migrate(path))
        self._process.wait()
        self._process, self._path = process, path

    async def _migrate(self, path: Path) -> None:
        place = f"unix:{self._directory}/stream"
        names = ("events", "x-ignore-shared", "return-path")
        wanted = [{"capability": name, "state": True} for name in names]
        async with Monitor.open(path, BOOT) as new, Monitor.open(self._path, BOOT) as old:
            for each in (new, old):
                await each.ask("migrate-set-capabilities", capabilities=wanted)
            await new.ask("migrate-incoming", uri=place)
            await old.ask("migrate", uri=place)
            while await new.status() != "running":
                await asyncio.sleep(0.001)
            with contextlib.suppress(QemuError):  # it may end before it answers
                await old.ask("quit")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._tap.close()
        self._memory.close()


@contextlib.contextmanager
def standing_still(pids: Sequence[str]) -> Iterator[None]:
    """Stop processes by a signal, for some time."""
    for pid in pids:
        os.kill(int(pid), signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(int(pid), signal.SIGCONT)


def row(suite: str, mode: str, seen: list[Pings]) -> tuple[str, ...]:
    lost = [len(pings.lost()) for pings in seen]
    gaps = sorted(pings.longest_gap * 1e3 for pings in seen)
    return (
        *(suite, mode, str(len(seen)), f"{statistics.median(lost):g}", f"{max(lost)}"),
        *(f"{statistics.median(gaps):.0f} ms", f"{gaps[-1]:.0f} ms"),
    )


def version(machine: PrivateSystemd, suite: str) -> str:
    """That of a QEMU, in short."""
    told = machine.run([binary(machine, suite), "--version"]).stdout
    return ".".join(told.split()[3].split(".")[:2])


def test_each_qemu_and_the_next(host_machine: PrivateSystemd) -> None:
    """Five upgrades of a guest of 512 MiB in each mode and QEMU, then from each QEMU to the next."""
    rows = []
    versions = {suite: version(host_machine, suite) for suite in SUITES}
    for suite in SUITES:
        with booted(host_machine, suite) as guest:
            for mode in ("live", "restart", "exec"):
                seen = []
                for _ in range(TIMES):
                    with watched(guest) as pings:
                        done = upgrade(guest, "--mode", mode)
                        assert 0 == done["exit_code"], done
                    seen.append(pings)
                    assert eventually(lambda: len(guest.qemus()) == 1)
                rows.append(row(versions[suite], mode, seen))
    with booted(host_machine, SUITES[0]) as guest:
        seen = []
        for suite in SUITES[1:]:
            guest.describe(binary=binary(host_machine, suite))
            with watched(guest) as pings:
                done = upgrade(guest, "--mode", "live")
                assert 0 == done["exit_code"], done
            seen.append(pings)
        rows.append(row(" to ".join(versions.values()), "live", seen))
    publish(
        "qemu",
        ("QEMU", "mode", "upgrades", "pings lost in one", "most", "ping gap", "longest"),
        rows,
    )
    assert all(int(each[4]) <= MOST for each in rows), rows


def test_beside_a_migration_by_hand(host_machine: PrivateSystemd, tmp_path: Path) -> None:
    """Two guests that are the same, one upgraded by hand and one by upgrader, in turn: by hand, ours,
    ours, by hand, and so on. The other one stands still meanwhile."""
    needs_qemu()
    hand = ByHand(host_machine, guest_files(), tmp_path)
    by_hand: list[Pings] = []
    ours: list[Pings] = []

    def once_by_hand() -> None:
        with standing_still(guest.qemus()), pinging(host_machine, HAND[1], OFTEN) as pings:
            assert hand.counts(3)
            hand.upgrade()
            assert hand.counts(10)
        by_hand.append(pings)

    def once_ours() -> None:
        with standing_still(hand.pids), watched(guest, OFTEN) as pings:
            done = upgrade(guest, "--mode", "live")
            assert 0 == done["exit_code"], done
        assert eventually(lambda: len(guest.qemus()) == 1)
        ours.append(pings)

    try:
        assert hand.counts(1)
        with booted(host_machine, "host") as guest:
            for number in range(ROUNDS):
                turns = (once_by_hand, once_ours)
                for turn in turns if number % 2 == 0 else reversed(turns):
                    turn()
    finally:
        hand.close()
    medians = [statistics.median(each.longest_gap for each in seen) for seen in (by_hand, ours)]
    publish(
        "qemu by hand",
        ("QEMU", "how", "upgrades", "pings lost in one", "most", "ping gap", "longest"),
        [
            row(version(host_machine, "host"), "by hand, over QMP", by_hand),
            row(version(host_machine, "host"), "upgrader", ours),
            ("ratio", "", "", "", "", f"{medians[1] / medians[0]:.2f}", ""),
        ],
    )
    assert medians[1] < 0.5
    assert medians[1] <= RATIO * medians[0]


#: Each kind of upgrade that fails: how the next QEMU is described, and what the caller is told.
FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "another machine type": ({"binary": "/srv/another/qemu"}, "load of migration failed"),
    "less memory": ({"memory": MEMORY // 2}, "-m of"),
    "no such binary": ({"binary": "/nowhere/qemu"}, "/nowhere/qemu: no such program"),
}
#: Without a preflight, it is found out while the machine stands still, or by the next runner.
WAYS = (("--mode", "live"), ("--mode", "restart"), ("--no-preflight", "--mode", "live"))


def left(guest: Machine) -> dict[str, list[str]]:
    """What an upgrade could leave behind: processes, FDs, sockets and interfaces."""
    run = guest.machine.run
    return {
        "QEMUs": guest.qemus(),
        "FDs kept": guest.show("NFileDescriptorStore"),
        "sockets": sorted(run(["ls", f"/run/vm/{guest.name}"]).stdout.split()),
        "interfaces": re.findall(r"^\d+: (\S+):", run(["ip", "-o", "link"]).stdout, re.M),
    }


def fails(guest: Machine, options: Sequence[str], words: str) -> tuple[str, ...]:
    """Have an upgrade fail: the caller is told why, the machine runs on, and nothing is left of it."""
    before = left(guest)
    with watched(guest) as pings:
        refused = upgrade(guest, *options)
        at = time.monotonic()
    told = refused["cause"]
    assert 0 != refused["exit_code"], refused
    assert words in told, refused
    assert told.startswith("preflight: ") is ("--no-preflight" not in options)
    assert [] == pings.lost(since=at), told
    assert len(pings.lost()) <= LOST, told
    assert eventually(lambda: left(guest) == before), (before, left(guest))
    gap = f"{pings.longest_gap * 1e3:.0f} ms"
    return (
        " ".join(options),
        str(len(pings.lost())),
        "0",
        gap,
        told.rpartition(": ")[2].partition(" (")[0],
    )


def test_each_failure(host_machine: PrivateSystemd) -> None:
    """Wrong machines, and a pair that cannot load: Debian 13's QEMU gives its network device rings that
    sid's refuses. In each mode, and if there is no preflight."""
    rows = []
    with booted(host_machine, "host") as guest:
        host_machine.write("/srv/another/qemu", ANOTHER)
        host_machine.run(["chmod", "755", "/srv/another/qemu"])
        for kind, (described, words) in FAILURES.items():
            guest.describe(**described)
            rows += [(kind, *fails(guest, way, words)) for way in WAYS]
    with booted(host_machine, "trixie", "pc-q35-10.0") as guest:
        guest.describe(binary=binary(host_machine, "sid"), kind="pc-q35-10.0")
        rows += [("10.0 to 11.1", *fails(guest, way, "load of migration failed")) for way in WAYS]
    publish(
        "qemu failures",
        ("what", "how", "pings lost", "lost afterwards", "ping gap", "the last words"),
        rows,
    )


@pytest.mark.parametrize(
    ("whom", "delays"),
    [
        ("QEMU", (0.0, 0.03, 0.06)),  # later, it may run the machine, which would be lost
        ("its runner", (0.0, 0.05, 0.1, 0.2)),
    ],
)
def test_what_is_killed(host_machine: PrivateSystemd, whom: str, delays: tuple[float, ...]) -> None:
    """As soon as it is there, or somewhat later: the machine goes on, on one side or the other, and has
    its network."""
    with booted(host_machine, "host") as guest:
        for delay in delays:
            (before,) = guest.qemus()
            with watched(guest) as pings:
                killer = threading.Thread(
                    target=kill_the_next, args=(guest, before, delay, whom == "QEMU")
                )
                killer.start()
                upgrade(guest, "--mode", "live")
                killer.join()
                assert eventually(lambda: len(guest.qemus()) == 1)
                at = time.monotonic()
            assert [] == pings.lost(since=at), whom
            guest.until(ActiveState="active")


def kill_the_next(guest: Machine, before: str, delay: float, qemu: bool) -> None:
    """Kill the QEMU that comes, or the process that has started it."""
    found: list[str] = []

    def there() -> bool:
        found[:] = [pid for pid in guest.qemus() if pid != before]
        return bool(found)

    assert eventually(there)
    with contextlib.suppress(OSError):
        with open(f"/proc/{found[0]}/stat") as file:
            parent = file.read().rpartition(")")[2].split()[1]
        time.sleep(delay)
        os.kill(int(found[0] if qemu else parent), signal.SIGKILL)
