# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that a service writes its output to instead of the journal, and what is new in them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from upgrader.protocol.fd import Fd

_MOST = 1 << 16  # bytes of each that are read, the last ones


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Files with their sizes at one time. They are held open: a name could be given to another file by
    the service, whose user may read less than who asks here."""

    files: Sequence[tuple[Fd, int]] = ()

    @classmethod
    def of(cls, pid: int) -> Self:
        """Those that are the standard output and error of a process, as far as this user may look."""
        files: dict[tuple[int, int], tuple[Fd, int]] = {}
        for number in (1, 2):
            with contextlib.suppress(OSError):
                place = f"/proc/{pid}/fd/{number}"
                if stat.S_ISREG(os.stat(place).st_mode):
                    fd = Fd(os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                    found = os.fstat(fd.fileno())
                    files.setdefault((found.st_dev, found.st_ino), (fd, found.st_size))
        return cls(tuple(files.values()))

    def lines(self) -> list[str]:
        """What was written since; if a file is shorter now, all of it."""
        text = b""
        for fd, before in self.files:
            with contextlib.suppress(OSError):
                size = os.fstat(fd.fileno()).st_size
                begin = max(before if size >= before else 0, size - _MOST)
                text += os.pread(fd.fileno(), _MOST, begin)
        return text.decode(errors="replace").splitlines()
