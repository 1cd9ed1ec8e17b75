# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the program tells of itself: the notify socket that it is given in place of PID 1's.

Abstract, so that a program which has dropped its privileges reaches it as well; so anybody can send,
and a message counts only if its sender is the program or below it. sd_notify(3).
"""

import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence

from upgrader.protocol.fd import received
from upgrader.runner.processes import parent

_SIZE = 1 << 16
_FDS = 253  # SCM_MAX_FD
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ONCE = 64  # messages taken without a look at anything else: anybody can send any number
_DEEPEST = 64  # generations of processes between a sender and the program
#: What PID 1 is told as well, of the program that serves.
RELAYED = ("STATUS", "WATCHDOG", "ERRNO", "EXTEND_TIMEOUT_USEC")

_log = logging.getLogger("upgrader")


class Notifications:
    """The socket. `on_message` gets the fields of each message of the program."""

    def __init__(self, on_message: Callable[[Mapping[str, str]], None]) -> None:
        self.program = 0  #: its PID; before it is known, nobody is listened to
        self._on_message = on_message
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        name = f"upgrader-run-{os.urandom(16).hex()}"
        self._sock.bind(f"\0{name}")
        self.address = f"@{name}"  #: for NOTIFY_SOCKET=

    def fileno(self) -> int:
        """Readable if there is something to `receive`."""
        return self._sock.fileno()

    def receive(self) -> None:
        """Take what has come: a sender blocks if nobody does. Whoever waits for BARRIER=1 waits for
        its FD to be closed, which it is."""
        for _ in range(_ONCE):
            space = socket.CMSG_SPACE(_FDS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_SIZE, space, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            sender, fds = 0, received(ancillary)
            for _, kind, part in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    sender, _, _ = _CREDENTIALS.unpack(part)
            if self._is_programs(sender):
                lines = data.decode(errors="replace").splitlines()
                self._on_message(dict(line.partition("=")[::2] for line in lines))
            else:
                _log.debug("a notification of process %d, which is not of the program", sender)
            for fd in fds:
                fd.close()

    def close(self) -> None:
        """Listen no more."""
        self._sock.close()

    def _is_programs(self, pid: int) -> bool:
        """Whether a process is the program, below it, or was: an orphan is this process's child."""
        for _ in range(_DEEPEST):
            if pid == self.program != 0:
                return True
            above = parent(pid)
            if above == os.getpid():
                return self.program != 0
            if above <= 1:
                return False
            pid = above
        return False


def relayed(fields: Mapping[str, str]) -> Sequence[str]:
    """What of a message is for PID 1."""
    return [f"{name}={fields[name]}" for name in RELAYED if name in fields]
