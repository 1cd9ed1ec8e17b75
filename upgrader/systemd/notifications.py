# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take the messages of sd_notify(3) as PID 1 does: of a sender that the kernel names, whole or not at all."""

from __future__ import annotations

import os
import socket
import struct

from upgrader.protocol.fd import Fd, received
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: What PID 1 takes at most: NOTIFY_BUFFER_MAX of systemd in bytes, and SCM_MAX_FD of the kernel.
_BYTES, _FDS = 4096, 253
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_FDS * 4)


class Notification(Value):
    """One message: its `fields`, none if it did not fit, the PID of its `sender`, and FDs, which
    whoever takes it closes."""

    sender: int
    fields: Sequence[str]
    fds: Sequence[Fd]


def notify_socket(prefix: str, directory: Path | None = None) -> tuple[socket.socket, str]:
    """Make a socket for such messages, and say its name as NOTIFY_SOCKET= has it: a new file in a
    directory, for everybody, or else a new abstract name. Raises OSError."""
    name = f"{prefix}-{os.urandom(16).hex()}"
    address = str(directory / name) if directory else f"\0{name}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(address)
        if directory:
            os.chmod(address, 0o666)
    except OSError:
        sock.close()
        raise
    return sock, address.replace("\0", "@")


def take(sock: socket.socket) -> Notification | None:
    """The next message; None if the socket was shut down and all were taken. Raises OSError."""
    data, ancillary, flags, _ = sock.recvmsg(_BYTES, _SPACE, socket.MSG_CMSG_CLOEXEC)
    if not ancillary:
        return None  # each message has credentials
    sender, fds = 0, received(ancillary)
    for level, kind, part in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender, _, _ = _CREDENTIALS.unpack(part)
    whole = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    fields = data.decode(errors="replace").split("\n") if whole else []
    return Notification(sender, [field for field in fields if field], fds)
