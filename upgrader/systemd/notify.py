# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling PID 1 things: the sd_notify(3) protocol with FDs and BARRIER=1.

Our own, because pystemd's notify passes no FDs and a D-Bus stack would cost every start 80 ms.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from upgrader.errors import NotifyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from upgrader.protocol.identity import HasFileno

#: Longest wait for PID 1 to take a datagram, and to answer a barrier, in seconds. PID 1 may be
#: busy with a daemon-reload; TimeoutStartSec= and TimeoutStopSec= default to 90 s.
PATIENCE = 30.0

_TOO_MANY = "raise LimitNOFILE=: all FDs that services of this user have parked count against it"


class Notifier:
    """Sends to NOTIFY_SOCKET; without one (`connected` is False) every message is dropped."""

    def __init__(self, path: str | None) -> None:
        self._sock: socket.socket | None = None
        if not path:
            return
        if path[0] not in "/@":
            raise NotifyError(f"NOTIFY_SOCKET={path!r} is not a UNIX socket address")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.settimeout(PATIENCE)
        try:
            sock.connect("\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            sock.close()
            raise NotifyError(f"NOTIFY_SOCKET={path!r}: {error.strerror}") from error
        self._sock = sock

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The notifier of this process; raises NotifyError for an unusable NOTIFY_SOCKET."""
        return cls(environment.get("NOTIFY_SOCKET"))

    @property
    def connected(self) -> bool:
        """Whether there is somebody to tell."""
        return self._sock is not None

    def send(self, *fields: str, fds: Sequence[HasFileno] = ()) -> None:
        """Send fields (`READY=1`, ...) as one datagram; raises NotifyError if it is not taken."""
        if self._sock is None:
            return
        message = "\n".join(fields).encode(errors="replace")
        numbers = struct.pack(f"{len(fds)}i", *(owner.fileno() for owner in fds))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        try:
            self._sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            why = error.strerror or "timed out"
            remedy = _TOO_MANY if error.errno == errno.ETOOMANYREFS else ""
            raise NotifyError(f"PID 1 did not take {fields[0]}: {why}", remedy=remedy) from error

    def barrier(self) -> None:
        """Wait until PID 1 has handled all that was sent before; raises NotifyError if it did not.

        `sd_notify_barrier(3)`: PID 1 closes its copy of the pipe when it gets to this message.
        """
        if self._sock is None:
            return
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            raise NotifyError(f"PID 1 cannot be waited for: {error.strerror}") from error
        try:
            with os.fdopen(writing, "wb", buffering=0) as end:
                self.send("BARRIER=1", fds=[end])
            poll = select.poll()
            poll.register(reading, 0)  # POLLHUP is always reported
            if not poll.poll(PATIENCE * 1000):
                raise NotifyError(f"PID 1 did not answer BARRIER=1 within {PATIENCE:.0f} s")
        finally:
            os.close(reading)

    def close(self) -> None:
        """Close the socket; further messages are dropped."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def one_line(text: str) -> str:
    """Text for STATUS=: a newline would start another field, and PID 1 takes 4096 bytes."""
    return " ".join(text.split())[:1000]
