# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a forked process must not have of an instance: FDs before the commit, and its signal handlers.

CLOEXEC does it for whatever is executed. A process that is only forked (a pool of workers, say)
would keep the channel and every connection open, however the one that forked it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.instance.interfaces import Closeable


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


_fences: weakref.WeakSet[Fence] = weakref.WeakSet()


_private: list[Callable[[], Iterable[int]]] = []


def keep_from_children(numbers: Callable[[], Iterable[int]]) -> None:
    """From here on, a forked process has none of these FDs: it would keep clients waiting for the end
    of a connection, and for an answer at a listener, longer than the instance lives."""
    _private.append(numbers)


def share_again(numbers: Callable[[], Iterable[int]]) -> None:
    """Take that back."""
    with contextlib.suppress(ValueError):
        _private.remove(numbers)


def catches(signals: Iterable[int]) -> None:
    """Note what this instance handles: a forked worker is ended by these signals, as by default.

    It shares the FD by which a handler wakes the loop: a SIGTERM to it would stop the *instance*.
    """
    _caught.update(signals)


_caught: set[int] = set()


def _in_child() -> None:
    for fence in list(_fences):
        fence.close()
    if _private:
        _take_away([number for numbers in _private for number in numbers() if number >= 0])
    if _caught:
        signal.set_wakeup_fd(-1)
        for number in _caught:
            signal.signal(number, signal.SIG_DFL)
    _unblock()


def _take_away(numbers: Iterable[int]) -> None:
    """Something else takes their places: objects of the parent's will close these numbers one day."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for number in numbers:
        os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _block() -> None:
    # One that comes before the handlers are gone would still wake the instance, and end nobody.
    _before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _caught)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before.mask)


_before = threading.local()
os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_in_child)
