# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pseudo-terminals: the master moves, and the session on the terminal sees nothing of it. pty(7)."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import TypedDict

from upgrader.backends.kind import BackendKind

_GET_NUMBER, _UNLOCK = 0x80045430, 0x40045431  # TIOCGPTN, TIOCSPTLCK
_OPEN_PEER = 0x5441  # TIOCGPTPEER
_SIZE = struct.Struct("HHHH")


class PtyFacts(TypedDict):
    """`index` is of one terminal of the devpts whose ptmx has the number `device`; `rows` and `columns`
    are its size."""

    device: int
    index: int
    rows: int
    columns: int


class Pty(BackendKind, name="pty"):
    """A new pseudo-terminal, as its master, which is non-blocking. Termios, size and the session belong
    to the terminal and stay."""

    facts = PtyFacts
    changing = frozenset({"rows", "columns"})

    def open(self) -> int:
        """Make a new one."""
        fd = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _UNLOCK, struct.pack("i", 0))
        return fd

    def refuse(self, fd: int) -> str:
        """Say why it is no master."""
        try:
            _index(fd)
        except OSError:
            return "it is no master of a pseudo-terminal"
        return ""

    def describe(self, fd: int) -> PtyFacts:
        """Say which terminal it is of."""
        # Not asked of the terminal: to open and close that would hang it up.
        device = os.fstat(fd).st_dev
        rows, columns, _, _ = _SIZE.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_SIZE.size)))
        return {"device": device, "index": _index(fd), "rows": rows, "columns": columns}

    def show(self, fd: int) -> str:
        """Show the name of the terminal."""
        return f"/dev/pts/{_index(fd)}"

    def open_terminal(self) -> int:
        """Open the terminal itself, for a process that shall run on it; the FD is the caller's. Raises
        OSError, and as `fileno`."""
        return _open_peer(self.fileno())


def _index(fd: int) -> int:
    return int(struct.unpack("I", fcntl.ioctl(fd, _GET_NUMBER, bytes(4)))[0])


def _open_peer(fd: int) -> int:
    return fcntl.ioctl(fd, _OPEN_PEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
