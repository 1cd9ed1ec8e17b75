# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests call by name: when they cannot run, and what no event announces; fixtures are in conftest."""

import contextlib
import fcntl
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Self

import pytest

# How long what a test started may take to happen: a slow CI machine needs seconds.
SETTLE = 20.0
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


class Closing(ABC):
    """What is closed at the end of its `with` block."""

    @abstractmethod
    def close(self) -> None:
        """End it, and free all that it has."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def runs(pid: int) -> bool:
    """Whether a process has not ended: nobody may have waited for one that has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def descendants() -> dict[int, str]:
    """Live processes that were started by this one, however indirectly: PID to command line.

    What a machine runs is left out: it goes with the machine, and its keeper is in the list.
    """
    found: dict[int, str] = {}
    open_ends = [os.getpid()]
    while open_ends:
        pid = open_ends.pop()
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").strip()
            if pid != os.getpid() and runs(pid):
                found[pid] = line.decode(errors="replace")
            if b"private_systemd.keeper" not in line:
                for task in os.listdir(f"/proc/{pid}/task"):
                    listed = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
                    open_ends += [int(entry) for entry in listed]
    return found


def started(program: str) -> list[int]:
    """Those processes below this one that run a Python program, by its path."""
    return [pid for pid, line in descendants().items() if program in line.split()[:2]]


def cannot_run(reason: str) -> NoReturn:
    """Skip the running test for `reason`; in CI, where nothing may go untested, fail it."""
    __tracebackhide__ = True
    if IN_CI:
        pytest.fail(f"cannot run, and CI skips nothing: {reason}", pytrace=False)
    pytest.skip(reason)


def eventually(condition: Callable[[], bool], seconds: float = SETTLE) -> bool:
    """Whether `condition` comes true in time; only for what offers no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def php_fpm() -> str:
    """The path of PHP-FPM, whose name has a version in Debian; empty if there is none."""
    found = [*Path("/usr/sbin").glob("php-fpm*"), *Path("/usr/bin").glob("php-fpm*")]
    return str(found[0]) if found else ""


def is_abandoned(cgroup: Path) -> bool:
    """Whether nobody will remove `cgroup`: a living keeper holds a lock on it."""
    try:
        fd = os.open(cgroup, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return cgroup.exists()
