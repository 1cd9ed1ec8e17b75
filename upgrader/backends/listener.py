# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses, and sockets bound to them: listeners and datagram sockets; accepts nothing."""

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import Self

from upgrader.errors import DeclarationError
from upgrader.protocol.identity import show_address

#: What systemd's Backlog= defaults to since 251 is "the kernel's limit"; so is this.
BACKLOG = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Address:
    """Where to bind: `host:port`, `[v6]:port`, `unix:/path` or `unix:@abstract`."""

    text: str
    family: socket.AddressFamily
    name: tuple[str, int] | str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address; raises DeclarationError that names it."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith(("/", "@")) or len(path) < 2:
                raise DeclarationError(text, "a UNIX address is unix:/path or unix:@name")
            return cls(text, socket.AF_UNIX, path)
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise DeclarationError(text, "an address is host:port, [v6]:port or unix:/path")
        bare = host.removeprefix("[").removesuffix("]")
        try:
            found = socket.getaddrinfo(bare or None, int(port), flags=socket.AI_PASSIVE)
        except OSError as error:
            raise DeclarationError(text, f"cannot be resolved: {error}") from error
        family, _, _, _, name = found[0]
        return cls(text, family, (str(name[0]), int(name[1])))

    def matches(self, sock: socket.socket) -> bool:
        """Whether a socket is bound here; port 0 matches any port."""
        if sock.family != self.family:
            return False
        if isinstance(self.name, str):
            return show_address(sock.getsockname()) == show_address(self.name)
        host, port = sock.getsockname()[:2]
        return host == self.name[0] and self.name[1] in (0, port)


def bind(address: Address, kind: socket.SocketKind) -> socket.socket:
    """Bind a non-blocking socket (and listen, for streams); raises OSError naming the address.

    A socket file that nobody listens on any more is replaced, a living one is not.
    """
    sock = socket.socket(address.family, kind | socket.SOCK_NONBLOCK)
    try:
        if isinstance(address.name, str):
            name = address.name
            if name.startswith("/"):
                _remove_stale(name, kind)
            sock.bind("\0" + name[1:] if name.startswith("@") else name)
        else:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address.name)
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise OSError(error.errno or errno.EINVAL, f"cannot bind {address.text}: {why}") from error
    return sock


def path_inode(sock: socket.socket) -> int:
    """The inode of the file that a UNIX socket is bound to; 0 without a file (any more)."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX or not isinstance(name, str) or not name:
        return 0
    try:
        return os.stat(name).st_ino
    except OSError:
        return 0


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    """Remove a socket file that nobody listens on; whatever else is there makes `bind` fail."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # connecting to it would be refused just the same
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:  # a full backlog included: somebody lives there
                return
