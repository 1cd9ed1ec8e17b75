# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory in a memfd: both instances map the same pages, and nothing is copied. memfd_create(2)."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TypedDict

from upgrader.backends.kind import BackendKind
from upgrader.errors import DeclarationError

#: Its size never changes, so that no access to a mapping of it can fail.
_FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEALS = {
    "seal": fcntl.F_SEAL_SEAL,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "write": fcntl.F_SEAL_WRITE,
    "future-write": 0x10,  # F_SEAL_FUTURE_WRITE, Linux 5.1
}


class MemoryFacts(TypedDict):
    """`device` and `inode` are of one memfd only; `seals` are in words."""

    device: int
    inode: int
    size: int
    seals: list[str]


class Memory(BackendKind, name="memory"):
    """A region of `size` bytes, all zero at first. Its size is sealed; what is in it is shared by all
    that map it, until `seal`."""

    facts = MemoryFacts

    def __init__(self, size: int) -> None:
        """Raises DeclarationError unless there is something to map."""
        if not 0 < size < 1 << 62:
            raise DeclarationError("Memory", f"of {size} bytes cannot be mapped")
        self._size = size

    def open(self) -> int:
        """Make a new memfd."""
        fd = os.memfd_create("upgrader-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(fd, self._size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def refuse(self, fd: int) -> str:
        """Say why it is no memfd of that size whose size is sealed."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            return "it is no memfd"
        if seals & _FIXED != _FIXED:
            return "its size is not sealed, so that it could shrink below a mapping"
        size = os.fstat(fd).st_size
        if size != self._size:
            return f"it has {size} bytes, and {self._size} are declared"
        return ""

    def describe(self, fd: int) -> MemoryFacts:
        """Say which memfd it is, its size and its seals."""
        found = os.fstat(fd)
        return {
            "device": found.st_dev,
            "inode": found.st_ino,
            "size": found.st_size,
            "seals": seals_of(fd),
        }

    def show(self, fd: int) -> str:
        """Say which seals it has."""
        return f"sealed: {', '.join(seals_of(fd))}"

    def map(self) -> mmap.mmap:
        """Map all of it: writable, unless it is sealed. Raises as `fileno`, OSError."""
        sealed = "write" in seals_of(self.fileno())
        # Before Linux 6.7 a sealed one cannot be mapped as shared; nothing writes, so nothing is copied.
        flags = mmap.MAP_PRIVATE if sealed else mmap.MAP_SHARED
        protection = mmap.PROT_READ if sealed else mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(self.fileno(), self._size, flags, protection)

    def seal(self) -> None:
        """Make it read-only for good, in every process. Raises OSError (EBUSY) while somebody has it
        mapped writable."""
        fcntl.fcntl(self.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def seals_of(fd: int) -> list[str]:
    """The seals of a memfd, in words; raises OSError for anything else."""
    found = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return sorted(word for word, seal in _SEALS.items() if found & seal)
