# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kinds of sockets have in common that are neither listeners nor connections of one."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from upgrader.backends.kind import BackendKind
from upgrader.protocol.kinds import show_address

if TYPE_CHECKING:
    from collections.abc import Iterator

_SO_DOMAIN = 39  # socket(7)


class SocketFacts(TypedDict):
    """The inode of a socket is its own while it is open."""

    inode: int
    family: int
    type: int
    protocol: int
    address: str


class SocketKind(BackendKind):
    """A non-blocking socket of one `family`."""

    facts: ClassVar[Any] = SocketFacts
    family: ClassVar[int] = 0

    def refuse(self, fd: int) -> str:
        """Say why it is no socket of this family."""
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return "it is no socket"
        with borrowed(fd) as sock:
            found = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        if found != self.family:
            names = [socket.AddressFamily(each).name for each in (found, self.family)]
            return f"it is {names[0]}, and not {names[1]}"
        return ""

    def describe(self, fd: int) -> SocketFacts:
        """Say which socket it is, and where it is bound."""
        with borrowed(fd) as sock:
            return {
                "inode": os.fstat(fd).st_ino,
                "family": sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN),
                "type": sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
                "protocol": sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
                "address": _show(sock.getsockname()),
            }

    def show(self, fd: int) -> str:
        """Show where it is bound."""
        with borrowed(fd) as sock:
            return _show(sock.getsockname())

    def socket(self) -> socket.socket:
        """Make a socket object of the same socket, on an FD of its own that is the caller's. Raises as
        `fileno`."""
        return socket.socket(fileno=os.dup(self.fileno()))


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object that does not own its FD; raises OSError for what is no socket."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def _show(name: object) -> str:
    """An address; those of AF_PACKET and AF_NETLINK have parts of all types."""
    if isinstance(name, tuple):
        return ":".join(part.hex() if isinstance(part, bytes) else str(part) for part in name)
    return show_address(name)
