# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closes, in forked processes, what a destination holds before the commit; nothing else.

CLOEXEC does it for whatever is executed. A process that is only forked (a pool of workers, say)
would keep the channel and every connection open, however the one that forked it ends.
"""

import contextlib
import os
import weakref
from typing import Protocol


class Closeable(Protocol):
    """An FD's owner."""

    def close(self) -> None:
        """Close the FD."""


class Fence:
    """Around what no other process may hold, until it is lifted."""

    def __init__(self, *owners: Closeable) -> None:
        self._owners = list(owners)
        _fences.add(self)

    def add(self, *owners: Closeable) -> None:
        """These, too."""
        self._owners += owners

    def lift(self) -> None:
        """From here on they are like any other FD of this process."""
        self._owners.clear()

    def close(self) -> None:
        """Close all of them."""
        for owner in self._owners:
            with contextlib.suppress(OSError):
                owner.close()


_fences: "weakref.WeakSet[Fence]" = weakref.WeakSet()


def _close_in_child() -> None:
    for fence in list(_fences):
        fence.close()


os.register_at_fork(after_in_child=_close_in_child)
