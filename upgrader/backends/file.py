# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: their place, their flags and their locks move. open(2), flock(2), fcntl_locking(2)."""

from __future__ import annotations

import io
import os
import stat
from typing import TypedDict

from upgrader.backends.fdinfo import flags, locks
from upgrader.backends.kind import BackendKind
from upgrader.errors import DeclarationError


class FileFacts(TypedDict):
    """Say which file it is, how it is open (`flags`, of F_GETFL), where (-1 if it only appends), and what
    it has locked, such as `OFDLCK WRITE 0 EOF`."""

    path: str
    device: int
    inode: int
    flags: int
    offset: int
    locks: list[str]


class OpenFile(BackendKind, name="file"):
    """A regular file or a directory, opened by its path; with its offset, its flags, and the locks that
    belong to the open file: flock(2) and F_OFD_SETLK. Those are held throughout.

    Locks of F_SETLK, which sqlite3 and `fcntl.lockf` take, belong to a process and are lost with it: a
    file that has one does not move. If another file is at the path by now, that one is opened, as at any
    start.
    """

    facts = FileFacts

    def __init__(
        self, path: str | os.PathLike[str], flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o600
    ) -> None:
        """`flags` and `mode` as of open(2). Raises DeclarationError for a path that is not absolute."""
        self.path = os.fspath(path)
        if not os.path.isabs(self.path):
            raise DeclarationError(f"OpenFile({self.path!r})", "the path is not absolute")
        self._flags = flags
        self._mode = mode

    def open(self) -> int:
        """Open the path."""
        return os.open(self.path, self._flags | os.O_CLOEXEC, self._mode)

    def refuse(self, fd: int) -> str:
        """Say why it is no file at all."""
        mode = os.fstat(fd).st_mode
        return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "it is no file"

    def stale(self, fd: int) -> str:
        """Say if another file is at the path."""
        try:
            there = os.stat(self.path)
        except OSError:  # removed: it may be one that shall have no name
            return ""
        same = os.path.samestat(os.fstat(fd), there)
        return "" if same else f"another file is at {self.path} by now"

    def describe(self, fd: int) -> FileFacts:
        """Say which file it is, and how it is open. Raises OSError if a lock of it would be lost."""
        found = os.fstat(fd)
        held = locks(fd)
        if lost := [lock for lock in held if lock.startswith("POSIX")]:
            raise OSError(
                f"it has a lock that belongs to this process ({lost[0]}): use F_OFD_SETLK or flock"
            )
        how = flags(fd)
        appends = how & os.O_APPEND or not stat.S_ISREG(found.st_mode)
        return {
            "path": self.path,
            "device": found.st_dev,
            "inode": found.st_ino,
            "flags": how,
            "offset": -1 if appends else os.lseek(fd, 0, os.SEEK_CUR),
            "locks": held,
        }

    def show(self, fd: int) -> str:
        """Show its path."""
        return self.path

    def file(self, mode: str = "r+") -> io.FileIO:
        """Make a file object on the same open file, unbuffered: what is in a buffer does not move."""
        return io.FileIO(os.dup(self.fileno()), mode)
