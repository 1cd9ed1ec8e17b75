# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say what most of each long wait of a client was: the pause, the first steps of the new instance, or a process of the
service that waited for a CPU."""

import contextlib
import threading
from collections import defaultdict
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Self

import msgspec

#: Seconds from which on a wait is long.
LONG = 0.01
_LOOK = 0.005  # seconds between two looks at the processes


class WaitCause(StrEnum):
    """What most of a wait was."""

    PAUSE = "pause"
    OPENING = "opening"
    CPU = "cpu"
    OTHER = "other"


class Wait(msgspec.Struct, frozen=True, array_like=True):
    """A request from when it was due to its answer, in seconds of CLOCK_MONOTONIC."""

    since: float
    until: float

    @property
    def seconds(self) -> float:
        """Return how long it was."""
        return self.until - self.since

    def within(self, since: float, until: float) -> float:
        """Return how many seconds of it lie between these two moments."""
        return max(0.0, min(self.until, until) - max(self.since, since))


class Switchover(msgspec.Struct, frozen=True):
    """When nobody served, in seconds of CLOCK_MONOTONIC: new work was held from `held` on, the new instance was the
    owner at `owned`, and a client had its first answer at `answered`."""

    held: float
    owned: float
    answered: float


class Delays:
    """How long each process of a cgroup has been ready to run and without a CPU, by its /proc/PID/schedstat; looked at
    all the time in a thread, while it is entered."""

    def __init__(self, members: Path) -> None:
        """`members`: the cgroup.procs, with PIDs as this process sees them."""
        self._members = members
        self._seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="delays", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def during(self, wait: Wait) -> float:
        """Return for how many seconds of this wait a process had no CPU: the one that waited for longest."""
        longest = 0.0
        for seen in list(self._seen.values()):
            before = [delay for at, delay in seen if at <= wait.since] or [seen[0][1]]
            after = [delay for at, delay in seen if at >= wait.until] or [seen[-1][1]]
            longest = max(longest, after[0] - before[-1])
        return min(longest, wait.seconds)

    def _watch(self) -> None:
        while True:
            over = self._over.wait(_LOOK)  # after the last wait, it looks once more
            with contextlib.suppress(OSError):
                for pid in self._members.read_text().split():
                    self._look(pid)
            if over:
                return

    def _look(self, pid: str) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            delay = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
            self._seen[pid].append((monotonic(), delay))


def attribute(wait: Wait, switchover: Switchover | None, without_cpu: float) -> WaitCause:
    """Name the largest part of a wait, unless more than half of it is unexplained; `without_cpu`: seconds of it in
    which the service had none."""
    parts = {WaitCause.CPU: without_cpu}
    if switchover:
        parts[WaitCause.PAUSE] = wait.within(switchover.held, switchover.owned)
        parts[WaitCause.OPENING] = wait.within(switchover.owned, switchover.answered)
    largest = max(parts, key=lambda cause: parts[cause])
    return largest if parts[largest] >= wait.seconds / 2 else WaitCause.OTHER
