# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a program has its listeners, and waits for them, as the kernel tells it."""

import contextlib
import os
from collections.abc import Iterable

from upgrader.runner.processes import RunningProcess


def listens(program: RunningProcess, inodes: Iterable[int]) -> bool:
    """Whether each socket is in an epoll(7) instance of a process of the program.

    proc_pid_fdinfo(5): `tfd` lines. Needs to be allowed to look at those processes: the same user,
    or CAP_SYS_PTRACE.
    """
    missing = set(inodes)
    for process in program.tree():
        place = f"/proc/{process.pid}"
        with contextlib.suppress(OSError):
            links = {number: os.readlink(f"{place}/fd/{number}") for number in _numbers(place)}
            for number, link in links.items():
                if link != "anon_inode:[eventpoll]":
                    continue
                with open(f"{place}/fdinfo/{number}", encoding="ascii") as file:
                    watched = [line.split()[1] for line in file if line.startswith("tfd:")]
                sockets = {links.get(each, "") for each in watched}
                missing -= {inode for inode in missing if f"socket:[{inode}]" in sockets}
        if not missing:
            return True
    return False


def has(program: RunningProcess, inode: int) -> bool:
    """Whether a socket may be open in a process of the program: it is, or nobody tells."""
    for process in program.tree():
        place = f"/proc/{process.pid}"
        with contextlib.suppress(FileNotFoundError):  # it has ended, or closed that
            try:
                links = [os.readlink(f"{place}/fd/{number}") for number in _numbers(place)]
            except PermissionError:
                return True
            if f"socket:[{inode}]" in links:
                return True
    return False


def _numbers(place: str) -> list[str]:
    return os.listdir(f"{place}/fd")
