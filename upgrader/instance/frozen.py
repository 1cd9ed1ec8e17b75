# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is at a safe point, with everything that moves with it: a connection, many that are alike, an
instance."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from stat import S_IFSOCK
from typing import TYPE_CHECKING

import msgspec

from upgrader.protocol import image
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.crowd import Crowd
from upgrader.protocol.fd import Fd, Number
from upgrader.protocol.identity import HasFileno, Identity
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.state import describe
from upgrader.protocol.table_pieces import Piece
from upgrader.protocol.tls_state import TlsSecrets, TlsState

if TYPE_CHECKING:
    from upgrader.instance.declarations import Declarations
    from upgrader.instance.save import Readers


class Frozen(msgspec.Struct, frozen=True):
    """A connection at a safe point: everything that moves with it."""

    listener: str
    sock: HasFileno
    identity: Identity
    state: ConnectionState
    tls: tuple[TlsState, TlsSecrets] | None = None
    secret: bytes = b""  #: what may be in no image


class FrozenCrowd(msgspec.Struct, frozen=True):
    """Connections that are alike, with the numbers of their FDs in the same order; somebody else owns
    those."""

    crowd: Crowd
    numbers: array[int]

    def each(self) -> Iterator[Frozen]:
        """One after the other."""
        crowd = self.crowd
        inodes, sessions = crowd.numbers, crowd.each_session
        family, kind, address = crowd.family, crowd.type, crowd.address
        for number, inode, session in zip(self.numbers, inodes, sessions, strict=True):
            what = Identity(inode, S_IFSOCK, family, kind, address)
            state = ConnectionState(Waiting.MESSAGE, session=session)
            yield Frozen(crowd.backend, Number(number), what, state)

    def only(self, places: Sequence[int]) -> FrozenCrowd:
        """Those in these places, of which there is one at least."""
        crowd = self.crowd
        inodes = array("Q", map(crowd.numbers.__getitem__, places)).tobytes()
        sessions = crowd.sessions
        if len(sessions) > 1:
            sessions = list(map(sessions.__getitem__, places))
        numbers = array("i", map(self.numbers.__getitem__, places))
        return FrozenCrowd(
            msgspec.structs.replace(crowd, inodes=inodes, sessions=sessions), numbers
        )


Moving = Frozen | FrozenCrowd


class _Columns:
    """A crowd as it grows."""

    def __init__(self) -> None:
        self.numbers = array("i")
        self.inodes = array("Q")
        self.sessions: list[bytes] = []

    @property
    def fewest_sessions(self) -> list[bytes]:
        sessions = self.sessions
        return sessions[:1] if sessions.count(sessions[0]) == len(sessions) else sessions


class Crowds:
    """Puts those that are alike together."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, int, str], _Columns] = {}

    def add(self, listener: str, number: int, what: Identity, session: bytes) -> None:
        """A connection that waits for a message with nothing in hand, and the number of its FD."""
        key = listener, what.family, what.type, what.address
        columns = self._found.get(key) or self._found.setdefault(key, _Columns())
        columns.numbers.append(number)
        columns.inodes.append(what.inode)
        columns.sessions.append(session)

    def join(self, frozen: FrozenCrowd) -> None:
        """All of a crowd."""
        crowd = frozen.crowd
        key = crowd.backend, crowd.family, crowd.type, crowd.address
        columns = self._found.setdefault(key, _Columns())
        columns.numbers.extend(frozen.numbers)
        columns.inodes.frombytes(crowd.inodes)
        columns.sessions += crowd.each_session

    @property
    def frozen(self) -> list[FrozenCrowd]:
        """The crowds; none is empty."""
        return [
            FrozenCrowd(Crowd(*key, each.inodes.tobytes(), each.fewest_sessions), each.numbers)
            for key, each in self._found.items()
        ]


class Built(msgspec.Struct, frozen=True):
    """A frozen instance: the image of all of it but its crowds, its FDs, the last pieces of tables that
    come before it, and its crowds."""

    manifest: image.Manifest
    fds: Sequence[HasFileno]
    pieces: Sequence[Piece] = ()
    crowds: Sequence[FrozenCrowd] = ()

    @property
    def count(self) -> int:
        """How many FDs move."""
        return len(self.fds) + sum(len(each.numbers) for each in self.crowds)

    def whole(self) -> image.Manifest:
        """Make the image of all of it."""
        crowds = [each.crowd for each in self.crowds]
        return image.in_columns(self.manifest, crowds) if crowds else self.manifest

    def forget_secrets(self) -> None:
        """Close the memory in which secrets have crossed: nobody reads it here."""
        if self.manifest.tls:
            for entry, fd in zip(self.manifest.entries, self.fds, strict=True):
                if entry.kind == Kind.SECRETS and isinstance(fd, Fd):
                    fd.close()


def spread(moving: Iterable[Moving]) -> list[Frozen]:
    """All of them, one by one."""
    found: list[Frozen] = []
    for item in moving:
        if isinstance(item, Frozen):
            found.append(item)
        else:
            found += item.each()
    return found


def gather(
    moving: Iterable[Moving], listeners: Collection[str]
) -> tuple[list[Frozen], list[FrozenCrowd]]:
    """Those that are no members of a crowd, and the crowds, of connections of these listeners."""
    alone: list[Frozen] = []
    crowds = Crowds()
    for item in moving:
        if isinstance(item, FrozenCrowd):
            if item.crowd.backend in listeners:
                crowds.join(item)
            else:
                alone += item.each()
            continue
        state = item.state
        if (
            item.tls is None
            and item.listener in listeners
            and state.waiting is Waiting.MESSAGE
            and not (state.unread or state.unsent or item.secret)
        ):
            crowds.add(item.listener, item.sock.fileno(), item.identity, state.session)
        else:
            alone.append(item)
    return alone, crowds.frozen


def in_crowds(declarations: Declarations, readers: Readers) -> list[str]:
    """The listeners of which the next instance takes connections that are alike as columns: no older
    version may want their sessions in another form."""
    return [
        listener
        for listener, connections in declarations.connections.items()
        if readers.crowds
        and (connections.session is None or not describe(connections.session).backward)
    ]
