# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author holds of what was declared: a state, a listener, a datagram socket; loads nothing."""

from socket import socket as Socket
from typing import Any, Generic, TypeVar

from upgrader.instance.declarations import Bound, DeclaredState

T = TypeVar("T")


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
        """The live, non-blocking socket; raises DeclarationError before `serve` has loaded it."""
        return self._bound.socket

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
        return self._bound.socket.accept()


class Datagrams(DeclaredSocket):
    """A declared datagram socket."""

    def recv(self, size: int = 65536) -> bytes:
        """Receive one datagram of up to `size` bytes (the rest of a larger one is lost); raises
        BlockingIOError when there is none."""
        return self.recvfrom(size)[0]

    def recvfrom(self, size: int = 65536) -> tuple[bytes, Any]:
        """Receive one datagram and the address that it came from; raises BlockingIOError."""
        if self._bound.backlog:
            data, address = self._bound.backlog.popleft()
            return data[:size], address
        return self._bound.socket.recvfrom(size)

    def sendto(self, data: bytes, address: Any) -> int:
        """Send one datagram; returns the number of bytes sent. Raises BlockingIOError when the
        receiver's buffer is full."""
        return self._bound.socket.sendto(data, address)
