# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that are alike, as columns of an image: there may be thousands, and clients wait."""

from array import array
from collections.abc import Sequence
from stat import S_IFSOCK

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.identity import Identity
from upgrader.protocol.kinds import Kind, Waiting


class Crowd(msgspec.Struct, frozen=True, array_like=True):
    """Connections of one listener that wait for a message with nothing in hand: they differ in their
    sockets' inodes and in their sessions only.

    `inodes` has eight bytes for each, as this machine has numbers in memory; `sessions` one for each, in
    the same order, or a single one that all have.
    """

    backend: str
    family: int
    type: int
    address: str
    inodes: bytes
    sessions: list[bytes]

    def __len__(self) -> int:
        return len(self.inodes) // 8

    def __str__(self) -> str:
        return f"{Kind.CONNECTION} of {self.backend!r}"

    def check(self) -> None:
        """Raise ImageError unless the columns fit each other."""
        if not self.inodes or len(self.inodes) % 8 or len(self.sessions) not in (1, len(self)):
            what = f"{len(self.inodes)} bytes of inodes, and {len(self.sessions)} sessions"
            raise ImageError(str(self), f"are alike, with {what}")

    @property
    def numbers(self) -> "array[int]":
        """The inodes."""
        return array("Q", self.inodes)

    @property
    def each_session(self) -> Sequence[bytes]:
        """The session of each, in their order."""
        return self.sessions if len(self.sessions) == len(self) else self.sessions * len(self)

    def identity(self, place: int) -> Identity:
        """What the socket of one of them is."""
        (inode,) = array("Q", self.inodes[place * 8 : place * 8 + 8])
        return Identity(inode, S_IFSOCK, self.family, self.type, self.address)

    def state(self, place: int) -> ConnectionState:
        """What moves with one of them besides its FD."""
        alone = len(self.sessions) == 1
        return ConnectionState(Waiting.MESSAGE, session=self.sessions[0 if alone else place])
