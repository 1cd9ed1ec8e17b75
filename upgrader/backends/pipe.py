# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pipes and FIFOs: what was written and not read yet moves with them. pipe(7), fifo(7)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import TYPE_CHECKING, TypedDict

from upgrader.backends.fdinfo import flags
from upgrader.backends.kind import BackendKind

if TYPE_CHECKING:
    from collections.abc import Sequence


class PipeFacts(TypedDict):
    """Say which pipe it is, which end (`flags`, of F_GETFL), and how many bytes it holds at most."""

    device: int
    inode: int
    flags: int
    capacity: int


class Pipe(BackendKind, name="pipe"):
    """A new pipe, whose FDs are the end to read and the end to write; or with a path the FIFO there,
    which is made if it is missing, open for both. All are non-blocking.

    An end that a worker has inherited is one of its own: this one moves without it.
    """

    facts = PipeFacts

    def __init__(self, path: str | os.PathLike[str] = "", mode: int = 0o600) -> None:
        """`mode`: of a FIFO that is made."""
        self.path = os.fspath(path)
        self._mode = mode

    def open(self) -> int:
        """Open the FIFO."""
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self.path, self._mode)
        return os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def count(self) -> int:
        """A pipe has two ends; a FIFO is opened for both at once."""
        return 1 if self.path else 2

    def open_all(self) -> Sequence[int]:
        """Open the FIFO, or both ends of a pipe."""
        return [self.open()] if self.path else os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def refuse(self, fd: int) -> str:
        """Say why it is no pipe."""
        return "" if stat.S_ISFIFO(os.fstat(fd).st_mode) else "it is no pipe"

    def describe(self, fd: int) -> PipeFacts:
        """Say which pipe and which end it is."""
        found = os.fstat(fd)
        return {
            "device": found.st_dev,
            "inode": found.st_ino,
            "flags": flags(fd),
            "capacity": fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ),
        }

    def show(self, fd: int) -> str:
        """Show the path of a FIFO."""
        return self.path or "both ends"
