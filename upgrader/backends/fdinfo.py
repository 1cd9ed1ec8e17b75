# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel says of an FD in /proc/self/fdinfo: proc_pid_fdinfo(5)."""

from __future__ import annotations

import fcntl
import os


def fdinfo(fd: int) -> list[tuple[str, str]]:
    """The lines of an FD, each a name and its text; a name may be there several times. Raises OSError."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
        pairs = [line.partition(":") for line in file]
    return [(name.strip(), text.strip()) for name, _, text in pairs]


def number(fd: int, name: str, base: int = 10) -> int:
    """A number that is there once; raises OSError for an FD that has none of that name."""
    for known, text in fdinfo(fd):
        if known == name:
            return int(text.split()[0], base)
    raise OSError(f"the kernel says no {name} of {opened(fd)}")


def texts(fd: int, name: str) -> list[str]:
    """All texts under a name."""
    return [text for known, text in fdinfo(fd) if known == name]


def opened(fd: int) -> str:
    """What an FD is open on, as /proc says: a path, `socket:[4711]`, `anon_inode:[eventfd]`."""
    return os.readlink(f"/proc/self/fd/{fd}")


def anonymous(fd: int) -> str:
    """Say which anonymous inode it is, such as `eventfd`; nothing for any other FD."""
    text = opened(fd)
    return text.removeprefix("anon_inode:").strip("[]") if text.startswith("anon_inode:") else ""


def locks(fd: int) -> list[str]:
    """The locks that an open file, or this process, has on a file: kind, access, and range."""
    found = []
    for text in texts(fd, "lock"):
        words = text.split()  # "1: FLOCK  ADVISORY  WRITE 4711 00:1f:815 0 EOF"
        found.append(" ".join([words[1], words[3], *words[-2:]]))
    return sorted(found)


def flags(fd: int) -> int:
    """How it is open, F_GETFL."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)
