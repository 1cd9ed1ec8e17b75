# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make cgroups that go with the process that made them, and remove what a killed one left.

Works in the unified hierarchy, whatever the machine mounts of it. Moves no process.
"""

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from upgrader.lab.private_systemd import linux
from upgrader.lab.private_systemd.linux import Mount, Namespace

_PREFIX = "upgrader-"


def enter_namespaces() -> None:
    """Give the calling thread a cgroup and a mount namespace of its own; raises OSError.

    Its cgroup is the root of what `mount` shows from then on, and no mount gets in or out.
    """
    linux.unshare(Namespace.CGROUP | Namespace.MOUNT)
    linux.mount(None, "/", flags=Mount.RECURSIVE | Mount.PRIVATE)


def mount(place: Path) -> None:
    """Mount cgroup2 on `place`, which may not lie on a cgroup2 itself; raises OSError.

    Call `enter_namespaces` first: mounting it from the first cgroup namespace would reset the
    options of the machine's own mount.
    """
    linux.mount("cgroup2", str(place), flags=Mount.NO_SUID | Mount.NO_DEV | Mount.NO_EXEC)


def make(parent: Path, kind: str = "") -> Path:
    """Make a cgroup below `parent`, locked until this process ends; sweep what others left there."""
    _sweep(parent)
    while True:
        cgroup = parent / f"{_PREFIX}{kind}{os.getpid()}-{secrets.token_hex(4)}"
        cgroup.mkdir()
        # Another's sweep may have been quicker: then once more.
        if _lock(cgroup) is not None:
            return cgroup


def remove(cgroup: Path) -> None:
    """Remove `cgroup` and all below it; raises OSError if a process is left in one of them."""
    for directory, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(directory)


def _sweep(parent: Path) -> None:
    """Remove the cgroups whose makers were killed."""
    for cgroup in parent.glob(f"{_PREFIX}*"):
        lock = _lock(cgroup, fcntl.LOCK_NB)
        if lock is not None:
            # Never with processes in it: the kernel refuses.
            with contextlib.suppress(OSError):
                remove(cgroup)
            os.close(lock)


def _lock(cgroup: Path, flags: int = 0) -> int | None:
    """Lock `cgroup` for this process; return None if another has it or it was just removed.

    The lock shows that its maker lives; a PID would not, because PIDs differ between namespaces.
    """
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        if os.path.exists(cgroup):
            return fd
    os.close(fd)
    return None
