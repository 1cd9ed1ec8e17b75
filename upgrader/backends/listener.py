# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses, and the sockets bound to them: listeners and datagram sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat

from upgrader.errors import DeclarationError
from upgrader.protocol.kinds import show_address
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

#: What systemd's Backlog= defaults to since 251 is "the kernel's limit"; so is this.
BACKLOG = 2**31 - 1
_DIGITS = 5  # of a port
_NAME = 253  # characters of a host name: RFC 1035, 2.3.4
_INET = (socket.AF_INET, socket.AF_INET6)


class Address(Value):
    """Where to bind one socket."""

    text: str
    family: socket.AddressFamily
    name: tuple[str, int] | str

    @classmethod
    def parse(cls, text: str) -> tuple[Self, ...]:
        """Read `host:port`, `[v6]:port`, `:port`, `unix:/path` or `unix:@abstract`; raises
        DeclarationError that names it.

        A host may have several addresses, of both families: a server listens on all of them. No
        host means every address of both families. An IPv6 address never takes IPv4 as well.
        """
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith(("/", "@")) or len(path) < 2 or "\0" in path:
                raise DeclarationError(text, "a UNIX address is unix:/path or unix:@name")
            return (cls(text, socket.AF_UNIX, path),)
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or len(port) > _DIGITS or int(port) > 65535:
            raise DeclarationError(text, "an address is host:port, [v6]:port or unix:/path")
        bare = host.removeprefix("[").removesuffix("]")
        if len(bare) > _NAME:
            raise DeclarationError(text[:_NAME], "a host name is never that long")
        try:
            # As bytes, a name in ASCII needs no codec for others, which takes a start a millisecond.
            name = bare.encode() if bare.isascii() else bare
            found = socket.getaddrinfo(
                name or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, ValueError) as error:  # a name may be none in any encoding
            raise DeclarationError(text, f"cannot be resolved: {error}") from error
        names = dict.fromkeys((each[0], str(each[4][0]), int(each[4][1])) for each in found)
        return tuple(cls(text, family, (name, number)) for family, name, number in names)

    def matches(self, sock: socket.socket, *, alone: bool = True) -> bool:
        """Whether a socket is bound here; port 0 matches any port.

        If it is not `alone`, there is a socket for IPv4 as well: then one that takes both is another.
        """
        if sock.family != self.family:
            return False
        if isinstance(self.name, str):
            return show_address(sock.getsockname()) == show_address(self.name)
        if self.family == socket.AF_INET6 and not alone and not _only_v6(sock):
            return False
        host, port = sock.getsockname()[:2]
        return host == self.name[0] and self.name[1] in (0, port)

    def has_port_of(self, sock: socket.socket) -> bool:
        """Whether a socket may be what keeps this address from being bound."""
        if sock.family not in _INET or isinstance(self.name, str):
            return False
        return int(sock.getsockname()[1]) == self.name[1]


def bind(address: Address, kind: socket.SocketKind, *, shared: bool = False) -> socket.socket:
    """Bind a non-blocking socket (and listen, for streams); raises OSError naming the address.

    A socket file that nobody listens on any more is replaced, a living one is not. `shared`: beside
    another datagram socket on that port that has SO_REUSEADDR as well.
    """
    sock = socket.socket(address.family, kind | socket.SOCK_NONBLOCK)
    try:
        if isinstance(address.name, str):
            name = address.name
            if name.startswith("/"):
                _remove_stale(name, kind)
            sock.bind("\0" + name[1:] if name.startswith("@") else name)
        else:
            if kind == socket.SOCK_STREAM or shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address.name)
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise OSError(error.errno or errno.EINVAL, f"cannot bind {address.text}: {why}") from error
    return sock


def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Accept one connection: (socket, address); raises BlockingIOError if there is none, OSError.

    A listener that does not listen does so again, see `release`.
    """
    try:
        return listener.accept()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        listen_again(listener)
        raise BlockingIOError(errno.EAGAIN, "listens again") from error


def listen_again(listener: socket.socket) -> None:
    """Have a listener listen that does not: a new version that wanted another address on that port
    has released it, and has ended since. Raises OSError if its address is taken."""
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.listen(BACKLOG)


def release(listener: socket.socket) -> None:
    """Stop listening, in whichever process the socket is open: its port can be bound anew, and
    `listen_again` takes it back. Connections that nobody has accepted are reset."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RD)


def is_shut(listener: socket.socket) -> bool:
    """Whether shutdown(2) has ended a UNIX listener, for good: nobody can connect to it any more."""
    poll = select.poll()
    poll.register(listener, 0)
    return listener.family == socket.AF_UNIX and bool(poll.poll(0))


def path_inode(sock: socket.socket) -> int:
    """The inode of the file that a UNIX socket is bound to; 0 without a file (any more)."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX or not isinstance(name, str) or not name:
        return 0
    try:
        return os.stat(name).st_ino
    except OSError:
        return 0


def _only_v6(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


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
