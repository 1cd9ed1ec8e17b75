# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counters of events, by which processes wake each other. eventfd(2)."""

from __future__ import annotations

import os
from typing import TypedDict

from upgrader.backends.fdinfo import anonymous, number
from upgrader.backends.kind import BackendKind


class EventFdFacts(TypedDict):
    """`id` is one eventfd's own while it is open (Linux 5.2)."""

    id: int
    count: int


class EventFd(BackendKind, name="eventfd"):
    """A non-blocking eventfd; with `semaphore`, a read takes one of its count."""

    facts = EventFdFacts
    changing = frozenset({"count"})

    def __init__(self, count: int = 0, *, semaphore: bool = False) -> None:
        self._count = count
        self._semaphore = semaphore

    def open(self) -> int:
        """Make a new one."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if self._semaphore else 0)
        return os.eventfd(self._count, flags)

    def refuse(self, fd: int) -> str:
        """Say why it is no eventfd."""
        return "" if anonymous(fd) == "eventfd" else "it is no eventfd"

    def describe(self, fd: int) -> EventFdFacts:
        """Say which one it is, and its count, which is not read for that."""
        return {"id": number(fd, "eventfd-id"), "count": number(fd, "eventfd-count", 16)}

    def show(self, fd: int) -> str:
        """Show its count."""
        return f"count {number(fd, 'eventfd-count', 16)}"
