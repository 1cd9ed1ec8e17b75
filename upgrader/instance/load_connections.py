# SPDX-License-Identifier: LGPL-2.1-or-later
"""The connections of an image: each is checked against the manifest, and what goes with it is loaded.

There may be thousands, and clients wait: what can be done once for all of a listener is done once, and
no socket is made before the commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from stat import S_IFSOCK, S_ISSOCK
from typing import TYPE_CHECKING, Any

import msgspec

from upgrader.errors import MismatchError, UnreadableState
from upgrader.instance.adopted import Adopted
from upgrader.instance.adopted_crowd import AdoptedCrowd
from upgrader.protocol import image
from upgrader.protocol.fd import Number
from upgrader.protocol.identity import identify
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.state import check_readable
from upgrader.protocol.state_codec import decoder, load

if TYPE_CHECKING:
    from upgrader.instance.declarations import Declarations, Protocols
    from upgrader.protocol.connection_state import ConnectionState
    from upgrader.protocol.crowd import Crowd
    from upgrader.protocol.fd import Fd
    from upgrader.protocol.identity import Identity
    from upgrader.protocol.parameters import Parameters
    from upgrader.protocol.received_fds import ReceivedFds
    from upgrader.protocol.saved_state import SavedState

#: Loads what goes with a connection, by its place in the manifest.
_Load = Callable[[int, "ConnectionState"], object]
_SOCKET = S_IFSOCK >> 12
_AT_ONCE = 1024  # of a crowd between two signs of life
_SIGN_OF_LIFE = 0.02  # seconds between two; a state may take its time to be made


class _Loading(msgspec.Struct, frozen=True):
    """How the connections of one listener are loaded. `decode`: the quick way for most of them, by what
    came of the session; `load` says why if that raises. `as_it_comes`: as of `Adopted`."""

    load: _Load
    decode: Callable[[bytes], object] | None = None
    as_it_comes: bool = False


class ConnectionLoader:
    """The connections of one image, by listener. `dropped` gets the fields that this version does not
    know, by the state that they are of; `progress` is told now and then how many are loaded;
    `tls`: what goes with those that speak TLS, by their places; `own` is told of what owns FDs here."""

    def __init__(
        self,
        declarations: Declarations,
        parameters: Parameters,
        manifest: image.Manifest,
        dropped: dict[str, set[str]],
        progress: Callable[[int], object],
        tls: Mapping[int, Any],
        own: Callable[[AdoptedCrowd], object],
    ) -> None:
        self.adopted: list[Adopted] = []
        self.crowds: list[AdoptedCrowd] = []
        self.withheld: list[image.LeftBehind] = []
        self._declarations = declarations
        self._parameters = parameters
        self._manifest = manifest
        self._dropped = dropped
        self._progress = progress
        self._tls = tls
        self._own = own
        self._known: dict[str, _Loading | None] = {}  # by listener
        self._now = time.monotonic()

    def load(self, fds: ReceivedFds) -> None:
        """Load all that have come: `fds` are those of the manifest's entries, in its order, then of its
        crowds. Raises MismatchError for one that is another, and IncompatibleState or UnreadableState for
        a state that cannot be read."""
        fstat, clock, over_tls = os.fstat, time.monotonic, self._tls
        told = clock()
        for place, (entry, fd) in enumerate(zip(self._manifest.entries, fds, strict=False)):
            connection = entry.connection
            if connection is None:
                continue
            said = entry.identity
            # The inode of a socket is unique while it is open: one question to the kernel is enough.
            found = fstat(fd.fileno())
            if found.st_ino != said.inode or not S_ISSOCK(found.st_mode):
                raise MismatchError(str(entry), said, identify(fd))
            tls = over_tls.get(place) if over_tls else None
            self._adopt(place, entry.backend, fd, said, connection, tls)
            if clock() > told + _SIGN_OF_LIFE:
                told = clock()
                self._progress(place)
        first = len(self._manifest.entries)
        for crowd in self._manifest.crowds or ():
            self._load_crowd(crowd, fds, first)
            first += len(crowd)

    def _adopt(
        self,
        place: int,
        listener: str,
        fd: Fd,
        said: Identity,
        connection: ConnectionState,
        tls: Any = None,
    ) -> None:
        loading = self._loading(listener)
        if loading is None:
            self._leave(listener, fd)
            return
        as_it_came, decode, load = loading.as_it_comes, loading.decode, loading.load
        try:
            session = decode(connection.session) if decode else load(place, connection)
        except Exception:  # whatever the author's __post_init__ raises, too
            if decode is None:
                raise
            session, as_it_came = load(place, connection), False
        adopted = Adopted(listener, fd, said, connection, session, self._now, tls, as_it_came)
        self.adopted.append(adopted)

    def _load_crowd(self, crowd: Crowd, fds: ReceivedFds, first: int) -> None:
        """The FDs of a crowd are those from this place on."""
        listener = crowd.backend
        numbers = fds.numbers[first : first + len(crowd)]
        self._identify(crowd, numbers)
        loading = self._loading(listener)
        if loading and loading.as_it_comes and _can_be_read(crowd, loading.decode):
            adopted = AdoptedCrowd(crowd, fds.take(first, len(crowd)), loading.decode, self._now)
            self._own(adopted)
            self.crowds.append(adopted)
            return
        for place in range(len(crowd)):
            fd, state = fds[first + place], crowd.state(place)
            self._adopt(first + place, listener, fd, crowd.identity(place), state)
            if not place % _AT_ONCE:
                self._progress(first + place)

    def _loading(self, listener: str) -> _Loading | None:
        if listener not in self._known:
            self._known[listener] = self._prepare(listener)
        return self._known[listener]

    def _identify(self, crowd: Crowd, numbers: Sequence[int]) -> None:
        """Raise MismatchError unless each of these FDs is the socket that it should be."""
        said, fstat = crowd.numbers, os.fstat
        for first in range(0, len(crowd), _AT_ONCE):
            some = numbers[first : first + _AT_ONCE]
            # By place, which for thousands of them takes half the time: 0 is the mode, 1 the inode.
            found = [status[1] if status[0] >> 12 == _SOCKET else 0 for status in map(fstat, some)]
            if found != said[first : first + _AT_ONCE].tolist():
                place = next(i for i, inode in enumerate(found, first) if inode != said[i])
                found_one = identify(Number(numbers[place]))
                raise MismatchError(str(crowd), crowd.identity(place), found_one)
            self._progress(first)

    def _leave(self, listener: str, fd: Fd) -> None:
        fd.close()
        if listener not in self._declarations.dropped:
            # The source had it on: no more could be drained there.
            self.withheld.append(image.LeftBehind(listener, "connection", "backend-transfer=no"))

    def _prepare(self, listener: str) -> _Loading | None:
        """How the connections of a listener are loaded; None if they do not come in."""
        if listener in self._declarations.dropped or not self._parameters.transfers(listener):
            return None
        header = self._manifest.sessions.get(listener)
        if protocols := self._declarations.protocols.get(listener):
            return _Loading(_checked(protocols, header))
        cls = self._declarations.connections[listener].session
        if cls is None:
            return _Loading(lambda place, connection: None, as_it_comes=header is None)
        if header is None:  # as a new field would: the source had none
            return _Loading(lambda place, connection: cls())
        item = f"state {header.name!r} of connections of {listener!r}"
        earlier = self._manifest.earlier or {}

        def load_session(place: int, connection: ConnectionState) -> object:
            saved = msgspec.structs.replace(
                header, data=connection.session, earlier=earlier.get(place) or msgspec.UNSET
            )
            session: object
            session, unknown = load(cls, saved)
            if unknown:
                self._dropped.setdefault(item, set()).update(unknown)
            return session

        decode: Callable[[bytes], object] | None = decoder(cls, header)
        # What an author's own code makes of a session may be another one each time.
        as_it_comes = decode is not None and not hasattr(cls, "__post_init__")
        return _Loading(load_session, decode, as_it_comes)


def _can_be_read(crowd: Crowd, decode: Callable[[bytes], object] | None) -> bool:
    """Whether all sessions of a crowd can; they are made once more when they are wanted."""
    if decode is None:
        return True
    try:
        for session in set(crowd.sessions):
            decode(session)
    except Exception:  # whoever loads them says why
        return False
    return True


def _checked(protocols: Protocols, found: SavedState | None) -> _Load:
    """Raise unless connections can go on under the library that owns this listener here."""
    own = protocols.header
    item = f"connections of {protocols.listener.name!r}"
    if found is None or found.name != own.name:
        what = found.name if found else "connections of a handler"
        raise UnreadableState(item, f"the image has {what} in place of {own.name}")
    check_readable(own.name, found.version, found.readable_from, own=own.version)

    def check(place: int, connection: ConnectionState) -> None:
        if connection.unsent or connection.waiting is not Waiting.MESSAGE:
            raise UnreadableState(item, "one of them is in the middle of something")

    return check
