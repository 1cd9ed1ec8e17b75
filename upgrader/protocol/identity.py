# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say what an FD is."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from enum import IntEnum
from typing import Protocol

import msgspec

from upgrader.protocol.kinds import show_address


class HasFileno(Protocol):
    """Anything that owns an FD: `Fd`, `socket.socket`, an open file."""

    def fileno(self) -> int:
        """The number of the FD."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """What an FD is. Sockets have family, type and address; anything else has a file type only.

    The inode of a socket is unique while it is open, and is the same in every process.
    """

    inode: int
    file_type: int
    family: int = 0
    type: int = 0
    address: str = ""

    @property
    def kind_name(self) -> str:
        """`SOCK_STREAM` and the like."""
        return _name(socket.SocketKind, self.type)

    def __str__(self) -> str:
        if not self.family:
            return f"a file of type {self.file_type:#o} (inode {self.inode})"
        family = _name(socket.AddressFamily, self.family)
        return f"{family} {self.kind_name} {self.address or '(no address)'} (inode {self.inode})"


def identify(owner: HasFileno) -> Identity:
    """Ask the kernel what an FD is; raises OSError for a closed one."""
    status = os.fstat(owner.fileno())
    file_type = stat.S_IFMT(status.st_mode)
    if not stat.S_ISSOCK(status.st_mode):
        return Identity(status.st_ino, file_type)
    if isinstance(owner, socket.socket):
        return _identify_socket(owner, status.st_ino)
    with borrowed(owner) as sock:
        return _identify_socket(sock, status.st_ino)


@contextlib.contextmanager
def borrowed(owner: HasFileno) -> Iterator[socket.socket]:
    """A socket whose owner keeps it, from any thread; raises OSError for a closed one."""
    number = owner.fileno()
    if number < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    sock = socket.socket(fileno=number)
    try:
        yield sock
    finally:
        sock.detach()


def is_socket(sock: socket.socket, said: Identity) -> bool:
    """Whether a socket is the one that was identified.

    Its address need not be asked for: one inode is one socket, and that is bound only once.
    """
    status = os.fstat(sock.fileno())
    return (
        status.st_ino == said.inode
        and stat.S_IFMT(status.st_mode) == said.file_type == stat.S_IFSOCK
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == said.family
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == said.type
    )


def _name(names: type[IntEnum], number: int) -> str:
    try:
        return names(number).name
    except ValueError:
        return str(number)


def _identify_socket(sock: socket.socket, inode: int) -> Identity:
    # Asked of the kernel as plain numbers: `sock.family` makes an enum each time, which counts
    # when there are thousands.
    family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    return Identity(inode, stat.S_IFSOCK, family, kind, show_address(sock.getsockname()))
