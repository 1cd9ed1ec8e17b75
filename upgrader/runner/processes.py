# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes held by pidfd, which no other process can be taken for."""

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence

from upgrader.protocol.fd import Fd
from upgrader.systemd.cgroup import directory
from upgrader.systemd.process_start import process_started

#: How most programs are ended that have not ended at their drain signal, before SIGKILL.
HARD = ((signal.SIGTERM, 1.0),)


class RunningProcess:
    """One process, of this or of an earlier runner."""

    def __init__(self, pidfd: Fd) -> None:
        """Raises OSError if that is no pidfd."""
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd)  #: -1 if it had ended long ago

    @classmethod
    def of(cls, pid: int) -> "RunningProcess":
        """The process that has this number now; raises OSError."""
        return cls(Fd(os.pidfd_open(pid)))

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self.pidfd.fileno()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.pid < 0 or bool(select.select([self.pidfd], [], [], 0)[0])

    async def ends(self, seconds: float) -> bool:
        """Whether it ends in time; one task at a time may wait for that."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        if self.ended:
            return True
        loop.add_reader(self, event.set)
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), number)

    @property
    def stopped(self) -> bool:
        """Whether it is stopped by a signal; proc_pid_stat(5)."""
        return _stat(self.pid)[:1] == ["T"]

    def children(self) -> "list[RunningProcess]":
        """The processes right below it."""
        found = []
        for pid in _children(self.pid):
            with contextlib.suppress(OSError):
                child = RunningProcess.of(pid)
                # Its parent lives, so it was no other process that had this number.
                if not self.ended:
                    found.append(child)
        return found

    def tree(self) -> "list[RunningProcess]":
        """This process and all below it, in the order of their ancestry."""
        found = [self]
        for process in found:
            found += process.children()
        return found

    def __str__(self) -> str:
        return f"process {self.pid}"


def end(
    processes: Sequence[RunningProcess], steps: Sequence[tuple[signal.Signals | None, float]]
) -> None:
    """End processes and all below them: each signal, and so many seconds for it; then SIGKILL. None:
    they were told already.

    A signal goes to the processes themselves: how those below them end is their business. One that is
    stopped goes on, to see it.
    """
    living = [each for each in processes if not each.ended]
    below = [child for each in living for child in each.tree()[1:]]
    for number, seconds in steps:
        if number:
            for each in living:
                each.send(number)
                each.send(signal.SIGCONT)
        deadline = time.monotonic() + seconds
        while (living := [each for each in living if not each.ended]) and _wait(living, deadline):
            pass
    below += [child for each in living for child in each.tree()]
    for each in below:
        each.send(signal.SIGKILL)
    while below := [each for each in below if not each.ended]:
        _wait(below, float("inf"))


def age(process: RunningProcess) -> float:
    """A key by which the youngest process comes first: minus its start, in seconds since boot; 0 if it
    has ended."""
    try:
        return -process_started(process.pid)
    except OSError:
        return 0.0


def members(place: str) -> Iterator[int]:
    """The processes in a cgroup and below it; raises OSError."""
    for below, _, _ in os.walk(place):
        with open(f"{below}/cgroup.procs", encoding="ascii") as file:
            yield from map(int, file.read().split())


def session(leader: int) -> list[RunningProcess]:
    """What lives of this process's cgroup in the session of a process, which may have ended: each program is
    started in one of its own."""
    found: list[RunningProcess] = []
    with contextlib.suppress(OSError):
        for pid in members(directory()):
            if _stat(pid)[3:4] == [str(leader)]:
                with contextlib.suppress(OSError):
                    found.append(RunningProcess.of(pid))
    return found


def orphans(leader: int) -> list[RunningProcess]:
    """What this process has adopted of the session of a process that it has started, and that has ended."""
    children = RunningProcess.of(os.getpid()).children()
    return [each for each in children if _stat(each.pid)[3:4] == [str(leader)]]


def parent(pid: int) -> int:
    """The parent of a process, 0 if it is not there."""
    stat = _stat(pid)
    return int(stat[1]) if stat else 0


def _stat(pid: int) -> list[str]:
    """What proc_pid_stat(5) has of a process from its state on; empty if it is not there."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _wait(processes: Sequence[RunningProcess], deadline: float) -> bool:
    """Whether one of them ends before a deadline of `time.monotonic`."""
    left = max(deadline - time.monotonic(), 0)
    return bool(select.select(processes, [], [], left if left < 1e9 else None)[0])


def _pid_of(pidfd: Fd) -> int:
    with open(f"/proc/self/fdinfo/{pidfd.fileno()}", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "Pid":
                return int(value)
    raise OSError(9, "no pidfd")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found
