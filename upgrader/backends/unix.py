# SPDX-License-Identifier: LGPL-2.1-or-later
"""UNIX sockets to other programs: what is under way on them moves, FDs included. unix(7)."""

from __future__ import annotations

import socket

from upgrader.backends.sockets import SocketKind


class UnixSocket(SocketKind, name="unix"):
    """A non-blocking UNIX socket that is connected to a path, or bound to one with `bind`. To the other
    end, SO_PEERCRED stays the process that has connected it."""

    family = socket.AF_UNIX

    def __init__(
        self, path: str, socket_type: int = socket.SOCK_STREAM, *, bind: bool = False
    ) -> None:
        """`socket_type`: SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM; with `bind` only the last."""
        self._path = path
        self._type = socket_type
        self._bind = bind

    def open(self) -> int:
        """Connect or bind it."""
        with socket.socket(socket.AF_UNIX, self._type) as sock:
            if self._bind:
                sock.bind(self._path)
            else:
                sock.connect(self._path)
            sock.setblocking(False)
            return sock.detach()

    def show(self, fd: int) -> str:
        """Show the path that it was made for."""
        return self._path
