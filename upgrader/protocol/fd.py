# SPDX-License-Identifier: LGPL-2.1-or-later
"""Owning one FD; what it is, `backends` knows."""

from __future__ import annotations

import fcntl
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

_SIZE = 4  # bytes of a number in SCM_RIGHTS, an int: unix(7)


class Fd:
    """Owns one FD: closes it once, at the latest when collected."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """The FD's number, or -1 once closed or detached."""
        return self._number

    def detach(self) -> int:
        """Give the number away; the caller owns the FD."""
        number, self._number = self._number, -1
        return number

    def duplicate(self) -> Fd:
        """A second FD (CLOEXEC) for the same open file description."""
        return Fd(fcntl.fcntl(self._number, fcntl.F_DUPFD_CLOEXEC, 3))

    def reopen(self) -> Fd:
        """A file opened anew, for reading: the same file, but another open file description."""
        return Fd(os.open(f"/proc/self/fd/{self._number}", os.O_RDONLY | os.O_CLOEXEC))

    def socket(self) -> socket.socket:
        """Turn into a socket object, which then owns the FD; raises OSError if it is none."""
        made = socket.socket(fileno=self._number)
        self._number = -1
        return made

    def close(self) -> None:
        """Close the FD; a second call does nothing."""
        number = self.detach()
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})"


class Number:
    """The number of an FD that somebody else owns."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """The number."""
        return self._number


def received(ancillary: Iterable[tuple[int, int, bytes]]) -> list[Fd]:
    """Own the FDs that recvmsg(2) has brought along; a number that was cut off is left out."""
    return [
        Fd(number)
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for number in memoryview(data[: len(data) - len(data) % _SIZE]).cast("i")
    ]
