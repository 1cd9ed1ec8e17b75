# SPDX-License-Identifier: LGPL-2.1-or-later
"""The processes that a replaced instance has started: they end with it, as at a stop of the unit.

Found are those below this process, so neither its successor nor takeover is among them: those are PID 1's
own. Each is held by pidfd, so that no number is taken for another process.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping

from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno
from upgrader.systemd.cgroup import unit_of

#: Seconds from SIGTERM to SIGKILL.
PATIENCE = 5.0
_ROUNDS = 8  # one that is killed may just have started another
_PIDFD = re.compile(r"^Pid:\t(\d+)$", re.MULTILINE)


def end_children(kept: Iterable[HasFileno], patience: float = PATIENCE) -> tuple[int, int]:
    """End all that this process has started, and what that has started; returns how many there were,
    and how many of them needed SIGKILL.

    Spared are processes of which a pidfd is among `kept`, with all below them, and what has moved to
    the cgroup of another unit.
    """
    spared = {os.getpid(), _resource_tracker(), *_processes_of(kept)}
    with contextlib.ExitStack() as held:
        found = _hold(held, spared)
        _end(found, signal.SIGTERM, patience)
        killed: set[int] = set()
        for _ in range(_ROUNDS):
            # What was held before is in it again if it still runs.
            if not (left := _hold(held, spared)):
                break
            found |= left
            killed |= left.keys()
            _end(left, signal.SIGKILL, patience)
        return len(found), len(killed)


def _end(found: Mapping[int, Fd], number: signal.Signals, patience: float) -> None:
    """Send a signal to all of them, and wait until they have ended, but not for longer."""
    for fd in found.values():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            signal.pidfd_send_signal(fd.fileno(), number)
    deadline = time.monotonic() + patience
    for fd in found.values():
        _ends(fd, deadline)


def _hold(held: contextlib.ExitStack, spared: Collection[int]) -> dict[int, Fd]:
    """A pidfd of each process below this one that runs."""
    found: dict[int, Fd] = {}
    unit = unit_of(_cgroup("self"))
    for pid in _below(os.getpid(), spared):
        with contextlib.suppress(OSError):
            fd = held.enter_context(Fd(os.pidfd_open(pid)))
            # What it says is of the process that is held only if that one still runs.
            if unit_of(_cgroup(pid)) == unit and not _ends(fd, 0):
                found[pid] = fd
    return found


def _below(pid: int, spared: Collection[int]) -> Iterator[int]:
    """All processes below one, without the spared ones and what is below those; parents first, so
    that none of them starts another one because its child was ended."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
            for child in children:
                if child not in spared:
                    yield child
                    yield from _below(child, spared)


def _cgroup(pid: int | str) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def is_pidfd(fd: HasFileno) -> bool:
    """Whether an FD stands for a process that runs; pidfd_open(2)."""
    return bool(_process_of(fd))


def _processes_of(fds: Iterable[HasFileno]) -> Iterator[int]:
    """The processes that pidfds among these stand for."""
    return (pid for fd in fds if (pid := _process_of(fd)))


def _process_of(fd: HasFileno) -> int:
    text = ""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd.fileno()}") as file:
        text = file.read()
    match = _PIDFD.search(text)
    return int(match[1]) if match else 0


def _resource_tracker() -> int:
    """Python's own, which ignores SIGTERM, and ends when the last process that uses it has; 0 for
    none."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    return getattr(getattr(module, "_resource_tracker", None), "_pid", None) or 0


def _ends(fd: Fd, deadline: float) -> bool:
    """Whether the process ends by the deadline (of `time.monotonic`)."""
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
