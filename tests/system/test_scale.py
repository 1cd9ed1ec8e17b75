# SPDX-License-Identifier: LGPL-2.1-or-later
"""From one to 16,000 FDs, and megabytes of state and memory, by live upgrade, restart and exec: nothing is
lost, and what it costs as ratios to what the kernel takes for the same FDs and bytes in the same run."""

import array
import contextlib
import functools
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests import tables
from tests.support import eventually
from tests.system.serving import Client, Install, Service, allow_many_fds
from tests.system.sized import LIMIT, ask_all, move, sized
from upgrader.lab.private_systemd import PrivateSystemd

IN_ONE_MESSAGE = 253
ROUNDS = 3
MODES = ("live", "restart", "exec")

#: Receives so many FDs on its standard input, and says so.
RECEIVER = """
import socket, sys
sock, left = socket.socket(fileno=0), int(sys.argv[1])
sock.send(b"x")
while left:
    _, rights, _, _ = sock.recvmsg(1, 2048)
    left -= len(rights[0][2]) // 4
sock.send(b"x")
"""
#: Stores so many FDs in its FD store, and says how many seconds PID 1 took for it.
STORER = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.connect(os.environ["NOTIFY_SOCKET"])
fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(int(sys.argv[1]))]
ends = [socket.socketpair() for _ in range((len(fds) + 1) // 2)]
fds = [one.fileno() for pair in ends for one in pair][: len(fds)]
begun = time.monotonic()
for fd in fds:
    socket.send_fds(sock, [b"FDSTORE=1"], [fd])
reading, writing = os.pipe()
socket.send_fds(sock, [b"BARRIER=1"], [writing])
os.close(writing)
os.read(reading, 1)
print(time.monotonic() - begun)
"""


def passed(fds: Sequence[int]) -> float:
    """Seconds to pass these FDs to another process."""
    here, there = socket.socketpair()
    with here, there:
        command = [sys.executable, "-c", RECEIVER, str(len(fds))]
        with subprocess.Popen(command, stdin=there) as receiver:
            assert here.recv(1)
            begun = time.perf_counter()
            for first in range(0, len(fds), IN_ONE_MESSAGE):
                rights = array.array("i", fds[first : first + IN_ONE_MESSAGE])
                here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            assert here.recv(1)
            seconds = time.perf_counter() - begun
        assert 0 == receiver.returncode
    return seconds


def stored(machine: PrivateSystemd, count: int) -> float:
    """Seconds for PID 1 to store that many FDs, each under a name of its own."""
    machine.write("/opt/upgrader-tests/storer.py", STORER)
    settings = ["FileDescriptorStoreMax=16384", "NotifyAccess=all", f"LimitNOFILE={LIMIT}"]
    command = ["systemd-run", "--quiet", "--pipe", "--wait"]
    command += [word for setting in settings for word in ("-p", setting)]
    python = [*machine.python, "/opt/upgrader-tests/storer.py", str(count)]
    return float(machine.run([*command, *python], timeout=120).stdout)


def copied(size: int, fds: Sequence[int]) -> float:
    """Seconds to write that many bytes to a memfd and read them again, whatever the FDs."""
    data = bytes(size)
    begun = time.perf_counter()
    with open(os.memfd_create("raw"), "w+b", buffering=0) as file:
        file.write(data)
        file.seek(0)
        assert len(file.read(size)) == size
    return time.perf_counter() - begun


@contextlib.contextmanager
def waiting(client: Client) -> Iterator[list[float]]:
    """Ask all the time; yields a list that gets the longest wait in seconds."""
    longest, over = [0.0], threading.Event()

    def ask() -> None:
        while not over.is_set():
            begun = time.perf_counter()
            if not client.ask("x"):
                longest[0] = float("inf")
                return
            longest[0] = max(longest[0], time.perf_counter() - begun)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield longest
    finally:
        over.set()
        thread.join()


class Measured:
    """What upgrades of one service have cost, by mode; and what the kernel takes for the same."""

    def __init__(self, raw: Callable[[], float]) -> None:
        self.pauses: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.waits: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.raw: list[float] = []
        self._measure = raw

    def round(self, service: Service, plain: Callable[[], object], active: Client) -> None:
        """One upgrade in each mode, and what they are compared with."""
        for mode in MODES:
            self.raw.append(self._measure())
            plain()
            with waiting(active) as longest:
                pause, seconds = move(service, mode)
            self.pauses[mode].append(pause)
            self.seconds[mode].append(seconds)
            self.waits[mode] += longest

    def row(self, plain: Sequence[float]) -> list[str]:
        """Medians: each pause beside its ratio to the raw cost, the whole restart to a plain one."""
        raw = statistics.median(self.raw)
        pauses = {mode: statistics.median(self.pauses[mode]) for mode in MODES}
        whole, beside = statistics.median(self.seconds["restart"]), statistics.median(plain)
        return [
            f"{raw * 1000:.1f}",
            *(
                f"{pauses[mode] * 1000:.0f} ({pauses[mode] / raw:.1f})"
                f" / {statistics.median(self.waits[mode]) * 1000:.0f}"
                for mode in MODES
            ),
            f"{whole * 1000:.0f} ({whole / beside:.1f})",
        ]


def measure(
    machine: PrivateSystemd,
    install: Install,
    name: str,
    count: int,
    raw: Callable[[Sequence[int]], float],
    rounds: int,
    **environment: str,
) -> tuple[Measured, list[float]]:
    """A service with that many idle clients, and one that asks all the time, upgraded in each mode."""
    allow_many_fds(count + 100)
    bare = sized(machine, install, f"{name}-bare")
    service = sized(machine, install, name, **environment)
    plain: list[float] = []

    def restart_bare() -> None:
        begun = time.monotonic()
        bare.restart()
        plain.append(time.monotonic() - begun)

    with service.clients(count) as clients, service.connect() as active:
        said = {held for _, _, held in ask_all(clients[:1], "fill")}
        ask_all(clients[1:])
        measured = Measured(lambda: raw([client.sock.fileno() for client in clients]))
        for _ in range(rounds):
            measured.round(service, restart_bare, active)
        answers = ask_all(clients)

        assert {2} == {times for times, _, _ in answers}
        assert {1 + len(MODES) * rounds} == {generation for _, generation, _ in answers}
        assert said == {held for _, _, held in answers}
        assert (count + 2 + ("MEMORY_MB" in environment), 0) == (
            service.status.fds, service.status.left_behind,
        )  # fmt: skip
        assert eventually(lambda: service.stored == 1 + ("MEMORY_MB" in environment))
    return measured, plain


@pytest.mark.parametrize("lazy", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_more_than_one_message(host_machine: PrivateSystemd, install: Install, lazy: bool) -> None:
    """The first number of FDs that one message does not take, in all modes."""
    environment = {"LAZY": "1"} if lazy else {}
    measure(
        host_machine, install, f"one-more-{lazy}".lower(), IN_ONE_MESSAGE + 1, passed, 1,
        **environment,
    )  # fmt: skip


@pytest.mark.matrix
def test_scale(host_machine: PrivateSystemd, install: Install) -> None:
    """FDs, state and memory."""
    rows = []
    for count, lazy in [
        (1, True), (253, True), (254, True), (1000, True), (1000, False), (8000, True),
        (8000, False), (16_000, True),
    ]:  # fmt: skip
        name = f"scale-{count}-{lazy}".lower()
        environment = {"LAZY": "1"} if lazy else {}
        measured, plain = measure(host_machine, install, name, count, passed, ROUNDS, **environment)
        kind = "with `lazy`" if lazy else "a handler each"
        rows.append([f"{count:,} connections, {kind}", *measured.row(plain)])
    for size in (1, 64, 512):
        measured, plain = measure(
            host_machine, install, f"state-{size}", 1, functools.partial(copied, size << 20), 1,
            STATE_MB=str(size),
        )  # fmt: skip
        rows.append([f"a state of {size} MB", *measured.row(plain)])
    for size in (1, 1024):
        measured, plain = measure(
            host_machine, install, f"memory-{size}", 1, passed, ROUNDS, MEMORY_MB=str(size)
        )
        rows.append([f"{size} MiB of memory", *measured.row(plain)])
    for count in (254, 1000, 4000):
        rows.append(
            [f"{count:,} FDs, each stored by PID 1", f"{stored(host_machine, count) * 1000:.0f}"]
        )
    head = ["what moves", "kernel, ms", *(f"{mode}: pause (ratio) / wait, ms" for mode in MODES)]
    head += ["restart, ms (ratio to a plain one)"]
    tables.publish("scale", head, [row + [""] * (len(head) - len(row)) for row in rows])
