# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets to the kernel: their groups and the messages that nobody has read yet move. netlink(7)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from upgrader.backends.sockets import SocketFacts, SocketKind, borrowed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SOL_NETLINK, _MEMBERSHIP, _MEMBERSHIPS = (
    270,
    1,
    9,
)  # NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS
_MOST = 512  # bytes of a set of groups, one bit each


class NetlinkFacts(SocketFacts):
    """`groups`: numbers of multicast groups; `sequence`: the last one that the program has used."""

    groups: list[int]
    sequence: int


class NetlinkSocket(SocketKind, name="netlink"):
    """A non-blocking netlink socket of one protocol (NETLINK_*), in multicast groups by their numbers.
    Its port stays what the process that made it had; `sequence` is the program's own count, and moves.
    """

    facts = NetlinkFacts
    changing = frozenset({"sequence"})
    family = socket.AF_NETLINK

    def __init__(self, protocol: int, groups: Sequence[int] = ()) -> None:
        self.sequence = 0  #: of the last request
        self._protocol = protocol
        self._groups = tuple(groups)

    def open(self) -> int:
        """Make a new one, and join the groups."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_NETLINK, kind, self._protocol) as sock:
            sock.bind((0, 0))
            for group in self._groups:
                sock.setsockopt(_SOL_NETLINK, _MEMBERSHIP, group)
            return sock.detach()

    def describe(self, fd: int) -> NetlinkFacts:
        """Give its port and its groups as well."""
        with borrowed(fd) as sock:
            bits = sock.getsockopt(_SOL_NETLINK, _MEMBERSHIPS, _MOST)
        groups = [
            32 * place + bit + 1
            for place, (word,) in enumerate(struct.iter_unpack("I", bits[: len(bits) & ~3]))
            for bit in range(32)
            if word >> bit & 1
        ]
        return {**super().describe(fd), "groups": groups, "sequence": self.sequence}

    def adopt(self, said: Mapping[str, Any]) -> None:
        """Count on from there."""
        self.sequence = said["sequence"]
