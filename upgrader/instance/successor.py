# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process of the destination, as the source knows it."""

import contextlib
import os
import select
import signal
from typing import Protocol

from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno


class SuccessorProcess(Protocol):
    """The process of the destination."""

    pid: int

    @property
    def alive(self) -> bool:
        """Whether it still runs."""

    def fileno(self) -> int:
        """Readable once it has ended."""

    def kill(self) -> None:
        """End it; whether that works decides nothing."""


class Successor:
    """The process that takeover registered, held by pidfd, so that its number cannot be reused."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = Fd(os.pidfd_open(pid))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return not first_ready(0, self._pidfd)

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._pidfd.fileno()

    def kill(self) -> None:
        """Make sure that it does not linger; whether it works decides nothing."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)


def first_ready(timeout: float, *owners: HasFileno) -> bool:
    """Whether one has something to read, or an end to be seen, within `timeout` seconds."""
    poll = select.poll()
    for owner in owners:
        poll.register(owner.fileno(), select.POLLIN)
    return bool(poll.poll(max(timeout, 0) * 1000))
