# SPDX-License-Identifier: LGPL-2.1-or-later
"""FDs that can move although nobody here knows what they are, and those of which that is not so."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

from upgrader.backends.fdinfo import anonymous, flags, opened
from upgrader.backends.kind import BackendKind

if TYPE_CHECKING:
    from collections.abc import Callable

#: By what /proc/self/fd says, why it is of no use in another process.
_STAYS = {
    "eventpoll": "an epoll instance watches the files of the process that has filled it: make a new one",
    "signalfd": "a signalfd has the signals of whoever reads it: make a new one",
    "io_uring": "the kernel passes on no io_uring: make a new one",
    "userfaultfd": "a userfaultfd belongs to the memory of the process that has made it",
    "perf_event": "a perf event of a task stands still once that has ended, and no FD says which it is",
    "kvm-vm": "a KVM machine belongs to the memory of the process that has made it",
    "kvm-vcpu": "a KVM machine belongs to the memory of the process that has made it",
}


class OpaqueFacts(TypedDict):
    """All that there is of any FD: `opened` is what /proc shows, `rdev` which device it is."""

    opened: str
    device: int
    inode: int
    rdev: int
    flags: int


class Opaque(BackendKind, name="opaque"):
    """Whatever `make` opens, a function that returns an FD. Two of one sort may look alike: anonymous
    inodes have no number of their own. What cannot move is refused, and the error says why."""

    facts = OpaqueFacts

    def __init__(self, make: Callable[[], int]) -> None:
        self._make = make

    def open(self) -> int:
        """Call the function."""
        return self._make()

    def refuse(self, fd: int) -> str:
        """Say why it cannot move."""
        sort = anonymous(fd)
        return next((why for word, why in _STAYS.items() if sort.startswith(word)), "")

    def describe(self, fd: int) -> OpaqueFacts:
        """Give what any FD has."""
        found = os.fstat(fd)
        return {
            "opened": opened(fd),
            "device": found.st_dev,
            "inode": found.st_ino,
            "rdev": found.st_rdev,
            "flags": flags(fd),
        }

    def show(self, fd: int) -> str:
        """Show what /proc says."""
        return opened(fd)
