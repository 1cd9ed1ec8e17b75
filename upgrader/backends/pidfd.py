# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes by pidfd: a worker that outlives the instance which has started it. pidfd_open(2)."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
from typing import TYPE_CHECKING, Any, TypedDict

from upgrader.backends.fdinfo import number
from upgrader.backends.kind import BackendKind
from upgrader.errors import DeclarationError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: PIDFD_GET_INFO of Linux 6.13, PIDFD_INFO_EXIT of 6.15: include/uapi/linux/pidfd.h.
_INFO = struct.Struct("QQ11Ii")
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_EXIT = 1 << 3


class PidFdFacts(TypedDict):
    """`inode` tells processes apart from Linux 6.9 on, `pid` alone while they run."""

    pid: int
    inode: int


class Child(BackendKind, name="pidfd"):
    """A process that this service has started once, and that lives on in every later generation: in a
    live upgrade and by exec always, in a restart and after a crash if KillMode=process leaves it. If it
    has ended by then, the next instance starts it anew. Without systemd it ends with the program.
    """

    facts = PidFdFacts

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment`: the whole of it, None for this one's. Raises DeclarationError for no command."""
        if not command:
            raise DeclarationError("Child", "has no command")
        self._command = list(command)
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None  # as long as it is this one's child

    def open(self) -> int:
        """Start the process."""
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return os.pidfd_open(self._process.pid)

    def refuse(self, fd: int) -> str:
        """Say why it is no pidfd."""
        try:
            number(fd, "Pid")
        except OSError:
            return "it is no pidfd"
        return ""

    def stale(self, fd: int) -> str:
        """Say if the process has ended."""
        return "it has ended" if _ended(fd) else ""

    def describe(self, fd: int) -> PidFdFacts:
        """Say which process it is."""
        return {"pid": number(fd, "Pid"), "inode": os.fstat(fd).st_ino}

    def verify(self, fd: int, said: Mapping[str, Any]) -> None:
        """Raise MismatchError for another process; one that is gone has no number any more."""
        found = self.describe(fd)
        if found["inode"] != said["inode"] or found["pid"] not in (-1, said["pid"]):
            raise MismatchError(self._item, f"process {said['pid']}", f"process {found['pid']}")

    def undo(self) -> None:
        """End the process, which serves nobody."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def show(self, fd: int) -> str:
        """Show the command, and the number of the process."""
        return f"process {number(fd, 'Pid')}: {' '.join(self._command)}"

    @property
    def pid(self) -> int:
        """The number of the process, -1 once it is gone. Raises as `fileno`."""
        return number(self.fileno(), "Pid")

    @property
    def ended(self) -> bool:
        """Whether it has ended; `fileno()` is readable from then on. Raises as `fileno`."""
        return _ended(self.fileno())

    @property
    def exit_code(self) -> int | None:
        """How it has ended, as `subprocess.Popen.returncode` says it; None while it runs, and where that
        cannot be learned: an instance that has not started it itself needs Linux 6.15."""
        if not self.ended:
            return None
        if self._process:
            return self._process.wait()
        try:
            found = _INFO.unpack(
                fcntl.ioctl(self.fileno(), _GET_INFO, _INFO.pack(_EXIT, *[0] * 13))
            )
        except OSError:
            return None
        return os.waitstatus_to_exitcode(found[13]) if found[0] & _EXIT else None

    def send_signal(self, number: int) -> None:
        """Send a signal to it; raises ProcessLookupError if it has ended, and as `fileno`."""
        signal.pidfd_send_signal(self.fileno(), number)


def _ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
