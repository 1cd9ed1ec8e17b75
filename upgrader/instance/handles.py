# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author holds of what was declared: a state, a listener, a datagram socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from socket import AF_INET, AF_INET6, AF_UNIX
from socket import socket as Socket
from typing import Any, Generic, TypeVar

from upgrader.backends.listener import accept
from upgrader.instance.declared_socket import Bound
from upgrader.instance.declared_state import DeclaredState

T = TypeVar("T")

#: The family of a socket address, by the length of its tuple.
_FAMILIES = {2: AF_INET, 4: AF_INET6}


class Declared(Generic[T]):
    """A declared state; `value` is the live object, once this instance is loaded."""

    def __init__(self, state: DeclaredState[T]) -> None:
        self._state = state

    @property
    def value(self) -> T:
        """The live state; raises DeclarationError before `serve` has loaded it."""
        return self._state.value


class DeclaredSocket:
    """A declared socket, live once this instance is loaded. Selectors take it for its FD."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    @property
    def name(self) -> str:
        """The name that it is declared under."""
        return self._bound.name

    @property
    def socket(self) -> Socket:
        """The live, non-blocking socket, the first one if there are several; raises
        DeclarationError before `serve` has loaded it."""
        return self._bound.socket

    @property
    def sockets(self) -> Sequence[Socket]:
        """All live sockets of this name: a `.socket` unit may have several lines, and a host several
        addresses. Raises DeclarationError before `serve` has loaded them."""
        return self._bound.sockets

    def fileno(self) -> int:
        """Return the number of the live FD; raises DeclarationError like `socket`."""
        return self._bound.fileno()


class Listener(DeclaredSocket):
    """A declared listener, for `connections` and `protocols`, or for programs that accept themselves."""

    def accept(self) -> tuple[Socket, Any]:
        """Accept one connection: (socket, address); raises BlockingIOError when there is none."""
        if self._bound.backlog:
            sock = self._bound.backlog.popleft()
            return sock, sock.getpeername()
        return _first_ready(self._bound.sockets, accept)


class Datagrams(DeclaredSocket):
    """A declared datagram socket."""

    def recv(self, size: int = 65536) -> bytes:
        """Receive one datagram of up to `size` bytes (the rest of a larger one is lost); raises
        BlockingIOError when there is none."""
        return self.recvfrom(size)[0]

    def recvfrom(self, size: int = 65536) -> tuple[bytes, Any]:
        """Receive one datagram and the address that it came from; raises BlockingIOError."""
        if told := self._bound.before_receiving:
            told()
        if self._bound.backlog:
            data, address = self._bound.backlog.popleft()
            return data[:size], address
        return _first_ready(self._bound.sockets, lambda sock: sock.recvfrom(size))

    def sendto(self, data: bytes, address: Any) -> int:
        """Send one datagram, from a socket of the family that `address` belongs to; returns the
        number of bytes sent. Raises BlockingIOError when the receiver's buffer is full."""
        family = AF_UNIX if isinstance(address, (str, bytes)) else _FAMILIES.get(len(address))
        fitting = [sock for sock in self._bound.sockets if sock.family == family]
        return (fitting or self._bound.sockets)[0].sendto(data, address)


def _first_ready(socks: Sequence[Socket], call: Callable[[Socket], T]) -> T:
    """What a call gives for the first socket that has something; raises BlockingIOError if none has."""
    for sock in socks[:-1]:
        with contextlib.suppress(BlockingIOError):
            return call(sock)
    return call(socks[-1])
