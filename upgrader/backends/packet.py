# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets for the frames of an interface: those that nobody has read yet move, too. packet(7)."""

from __future__ import annotations

import socket

from upgrader.backends.sockets import SocketKind

_ALL = 3  # ETH_P_ALL


class PacketSocket(SocketKind, name="packet"):
    """A raw, non-blocking AF_PACKET socket on one interface. A ring that is mapped moves no place in
    it."""

    family = socket.AF_PACKET

    def __init__(self, interface: str, protocol: int = _ALL) -> None:
        """`protocol`: ETH_P_*."""
        self._interface = interface
        self._protocol = protocol

    def open(self) -> int:
        """Make a new one; takes CAP_NET_RAW."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        sock = socket.socket(socket.AF_PACKET, kind, socket.htons(self._protocol))
        with sock:
            sock.bind((self._interface, self._protocol))
            return sock.detach()
