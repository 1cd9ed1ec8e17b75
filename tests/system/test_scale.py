# SPDX-License-Identifier: LGPL-2.1-or-later
"""From one to 16,000 FDs, and megabytes of state and memory, by live upgrade, restart and exec: nothing is
lost, and what it costs as ratios to what the kernel takes for the same FDs and bytes in the same run."""

import array
import contextlib
import functools
import os
import select
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
Row = Callable[[PrivateSystemd, Install], list[str]]

#: Receives so many FDs on its standard input, and says so; before that it asks what each of them is, or
#: watches each.
RECEIVER = """
import array, os, select, socket, sys
sock, left, more = socket.socket(fileno=0), int(sys.argv[1]), sys.argv[2]
sock.send(b"x")
fds = array.array("i")
while left:
    _, rights, _, _ = sock.recvmsg(1, 2048)
    fds.frombytes(rights[0][2])
    left -= len(rights[0][2]) // 4
if more == "identify":
    for fd in fds:
        os.fstat(fd)
if more == "watch":
    epoll = select.epoll()
    for fd in fds:
        epoll.register(fd, select.EPOLLIN)
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


def passed(fds: Sequence[int], more: str = "") -> float:
    """Seconds to pass these FDs to another process. `more`: that asks what each is (`identify`), or
    this one stops watching all of them, and that one watches them (`watch`)."""
    here, there = socket.socketpair()
    with here, there, select.epoll() as epoll:
        for fd in fds if more == "watch" else ():
            epoll.register(fd, select.EPOLLIN)
        command = [sys.executable, "-c", RECEIVER, str(len(fds)), more]
        with subprocess.Popen(command, stdin=there) as receiver:
            assert here.recv(1)
            begun = time.perf_counter()
            epoll.close()
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

    def __init__(self, raw: Callable[[], float], beside: Callable[[str], float]) -> None:
        """`raw`: seconds that the kernel takes for the same; `beside`: with what has to be done more."""
        self.pauses: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.waits: dict[str, list[float]] = {mode: [] for mode in MODES}
        self.raw: list[float] = []
        self.beside: dict[str, list[float]] = {"identify": [], "watch": []}
        self._measure = raw
        self._measure_beside = beside

    def round(self, service: Service, plain: Callable[[], object], active: Client) -> None:
        """One upgrade in each mode, and what they are compared with."""
        for mode in MODES:
            self.raw.append(self._measure())
            for more, seconds in self.beside.items():
                seconds.append(self._measure_beside(more))
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
            " / ".join(f"{statistics.median(each) * 1000:.1f}" for each in self.beside.values()),
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
        numbers = [client.sock.fileno() for client in clients]
        measured = Measured(lambda: raw(numbers), lambda more: passed(numbers, more))
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


def connections(count: int, lazy: bool) -> Row:
    def row(machine: PrivateSystemd, install: Install) -> list[str]:
        name = f"scale-{count}-{lazy}".lower()
        environment = {"LAZY": "1"} if lazy else {}
        measured, plain = measure(machine, install, name, count, passed, ROUNDS, **environment)
        kind = "with `lazy`" if lazy else "a handler each"
        return [f"{count:,} connections, {kind}", *measured.row(plain)]

    return row


def state(size: int) -> Row:
    def row(machine: PrivateSystemd, install: Install) -> list[str]:
        raw = functools.partial(copied, size << 20)
        measured, plain = measure(
            machine, install, f"state-{size}", 1, raw, 1, STATE_MB=str(size)
        )  # fmt: skip
        return [f"a state of {size} MB", *measured.row(plain)]

    return row


def memory(size: int) -> Row:
    def row(machine: PrivateSystemd, install: Install) -> list[str]:
        measured, plain = measure(
            machine, install, f"memory-{size}", 1, passed, ROUNDS, MEMORY_MB=str(size)
        )
        return [f"{size} MiB of memory", *measured.row(plain)]

    return row


def one_by_one(count: int) -> Row:
    def row(machine: PrivateSystemd, install: Install) -> list[str]:
        return [f"{count:,} FDs, each stored by PID 1", f"{stored(machine, count) * 1000:.0f}"]

    return row


#: In the order of the table; `-k 8000` measures two of them.
ROWS: dict[str, Row] = {
    "1-lazy": connections(1, lazy=True),
    "253-lazy": connections(253, lazy=True),
    "254-lazy": connections(254, lazy=True),
    "1000-lazy": connections(1000, lazy=True),
    "1000-handlers": connections(1000, lazy=False),
    "8000-lazy": connections(8000, lazy=True),
    "8000-handlers": connections(8000, lazy=False),
    "16000-lazy": connections(16_000, lazy=True),
    "state-1": state(1),
    "state-64": state(64),
    "state-512": state(512),
    "memory-1": memory(1),
    "memory-1024": memory(1024),
    "stored-254": one_by_one(254),
    "stored-1000": one_by_one(1000),
    "stored-4000": one_by_one(4000),
}
HEAD = [
    "what moves", "kernel, ms", "identified / watched, ms",
    *(f"{mode}: pause (ratio) / wait, ms" for mode in MODES),
    "restart, ms (ratio to a plain one)",
]  # fmt: skip
seen: dict[str, list[str]] = {}


@pytest.mark.matrix
@pytest.mark.parametrize("what", ROWS)
def test_scale(host_machine: PrivateSystemd, install: Install, what: str) -> None:
    """FDs, state and memory, a row each; the table is written once all of them are there."""
    row = ROWS[what](host_machine, install)
    seen[what] = row + [""] * (len(HEAD) - len(row))
    print(*(f"{name}: {cell}" for name, cell in zip(HEAD, row, strict=False)), sep="\n")
    if seen.keys() == ROWS.keys():
        tables.publish("scale", HEAD, list(seen.values()))
