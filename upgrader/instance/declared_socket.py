# SPDX-License-Identifier: LGPL-2.1-or-later
"""A socket that a program declares: a listener or a datagram socket, and the live sockets of its name."""

from __future__ import annotations

import logging
import string
from collections import deque
from collections.abc import Callable, Sequence
from socket import SOCK_DGRAM, SOCK_STREAM, SocketKind
from socket import socket as Socket
from typing import TYPE_CHECKING, Any

from upgrader.errors import DeclarationError
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later
from upgrader.systemd.fdstore import StoreName

if TYPE_CHECKING:
    from upgrader.backends import datagrams
    from upgrader.backends.listener import Address
else:
    datagrams = later("upgrader.backends.datagrams")

_log = logging.getLogger("upgrader")

#: A name is part of an FDNAME: at most 255 bytes, no colon, with our prefix before it.
_NAME = 100  # characters
_FIRST = frozenset(string.ascii_letters + string.digits)
_OTHERS = _FIRST | {*"._-"}


class Bound:
    """A declared socket: a listener or a datagram socket, live once this instance is loaded."""

    def __init__(
        self, kind: Kind, name: str, addresses: Sequence[Address] = (), receive_buffer: int = 0
    ) -> None:
        """`receive_buffer`: bytes that each socket shall have at least; 0 leaves that to the kernel."""
        self.kind = kind
        self.name = name
        self.addresses = tuple(addresses)  #: where to bind, one socket each
        self.persistent = False  # bound by the service itself, so kept in the FD store
        #: Of a socket that this one replaces: connections accepted there, or datagrams received,
        #: with where they came from.
        self.backlog: deque[Any] = deque()
        #: Called, from any thread, when somebody is about to receive a datagram.
        self.before_receiving: Callable[[], object] | None = None
        self._receive_buffer = receive_buffer
        self._socks: tuple[Socket, ...] = ()

    @property
    def socket_type(self) -> SocketKind:
        """What the kernel calls it."""
        return SOCK_STREAM if self.kind is Kind.LISTENER else SOCK_DGRAM

    @property
    def socket(self) -> Socket:
        """The live, non-blocking socket, the first one if there are several; raises
        DeclarationError before `serve` has loaded it."""
        return self.sockets[0]

    @property
    def sockets(self) -> tuple[Socket, ...]:
        """All live sockets of this name: a `.socket` unit may have several lines, and a host several
        addresses. Raises DeclarationError before `serve` has loaded them."""
        if not self._socks:
            raise DeclarationError(self.name, "is not open before serve() has begun")
        return self._socks

    @property
    def stored_names(self) -> list[StoreName]:
        """The names of all live sockets in the FD store, of those that the service has bound."""
        count = len(self._socks) if self.persistent else 0
        return [StoreName.of_backend(self.kind, self.name, number) for number in range(count)]

    def open(self, *socks: Socket) -> None:
        """Set the live sockets."""
        self._socks = socks
        wanted = self._receive_buffer
        for sock in socks if wanted else ():
            if (size := datagrams.enlarge(sock, wanted)) < wanted:
                _log.warning(
                    "%s %r: a receive buffer of %d bytes, not %d: raise net.core.rmem_max, or set"
                    " ReceiveBuffer= in a .socket unit", self.kind, self.name, size, wanted,
                )  # fmt: skip

    def fileno(self) -> int:
        """The number of the live FD, for selectors; of the first one if there are several."""
        return self.socket.fileno()

    def close(self) -> None:
        """Close the live sockets, if any."""
        for sock in self._socks:
            sock.close()
        self._socks = ()


def check_name(item: str, name: str) -> None:
    """Raise DeclarationError for what cannot be part of an FDNAME."""
    if not (0 < len(name) <= _NAME and name[0] in _FIRST and _OTHERS.issuperset(name)):
        raise DeclarationError(item, "a name has letters, digits, dots, dashes, at most 100")
