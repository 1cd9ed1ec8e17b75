# SPDX-License-Identifier: LGPL-2.1-or-later
"""Own the FDs that have come with a stream: there may be thousands, and clients wait."""

import contextlib
import os
import socket
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

from upgrader.protocol.fd import Fd


class ReceivedFds(Sequence[Fd]):
    """FDs in the order in which they have come. One is an `Fd` as soon as somebody looks at it; all
    are closed at the latest when collected, but for those that were taken."""

    def __init__(self, fds: Iterable[Fd] = ()) -> None:
        self._looked_at = dict(enumerate(fds))  # by place
        #: By place, -1 for one that is not here any more.
        self.numbers = array("i", [fd.fileno() for fd in self._looked_at.values()])

    @classmethod
    def of(cls, ancillary: Iterable[tuple[int, int, bytes]]) -> Self:
        """Those that recvmsg(2) has brought along; a number that was cut off is left out."""
        came = cls()
        size = came.numbers.itemsize
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                came.numbers.frombytes(data[: len(data) - len(data) % size])
        return came

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Fd: ...

    @overload
    def __getitem__(self, place: slice) -> list[Fd]: ...

    def __getitem__(self, place: int | slice) -> Fd | list[Fd]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if found := self._looked_at.get(place):
            return found
        made = self._looked_at[place] = Fd(self.numbers[place])
        return made

    def __iter__(self) -> Iterator[Fd]:
        looked_at = self._looked_at
        for place, number in enumerate(self.numbers):
            fd = looked_at.get(place)
            if fd is None:
                fd = looked_at[place] = Fd(number)
            yield fd

    def join(self, more: "ReceivedFds") -> None:
        """Own these as well, which come after the others; nobody has looked at them."""
        self.numbers += more.numbers
        more.numbers = array("i")

    def take(self, first: int, count: int) -> "array[int]":
        """The numbers of so many from this place on, which the caller owns now; nobody has looked at
        them."""
        taken = self.numbers[first : first + count]
        self.numbers[first : first + count] = array("i", [-1]) * len(taken)
        return taken

    def close(self) -> None:
        """Close all that are here, those that somebody has looked at as well."""
        for fd in self._looked_at.values():
            fd.close()
        self._close_others()

    def _close_others(self) -> None:
        for place, number in enumerate(self.numbers):
            if number >= 0 and place not in self._looked_at:
                self.numbers[place] = -1
                with contextlib.suppress(OSError):
                    os.close(number)

    def __del__(self) -> None:
        self._close_others()
