# SPDX-License-Identifier: LGPL-2.1-or-later
"""Main processes of a service under test: children of the test, or adopted by it."""

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import Protocol

from upgrader.protocol.fd import Fd


class Process(Protocol):
    """The part of `subprocess.Popen` that both kinds have."""

    pid: int

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit status; raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""


class AdoptedProcess:
    """A process that takeover has started. Takeover is gone by then, so it is this one's child."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is no such process."""
        self.pid = pid
        self._pidfd = Fd(os.pidfd_open(pid))
        self._status: int | None = None

    def poll(self) -> int | None:
        """As of Popen."""
        if self._status is None and self._has_ended(0):
            self._status = self._reap()
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """As of Popen."""
        if self._status is None:
            self._has_ended(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """As of Popen."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd.fileno(), number)

    def _has_ended(self, timeout: float | None) -> bool:
        poll = select.poll()  # a test may hold more FDs than select(2) takes
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _reap(self) -> int:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):  # its parent has not quite ended
                _, status = os.waitpid(self.pid, 0)
                self._pidfd.close()
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return 0  # somebody else has taken its status
