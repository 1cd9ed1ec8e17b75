# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parking an instance: state and FDs into an image, the image into a channel that PID 1 holds.

Saving changes and destroys nothing: until PID 1 holds the channel, this instance can go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from socket import socket
from typing import TYPE_CHECKING, Any

import msgspec

from upgrader.backends.listener import path_inode
from upgrader.errors import BackendError, BusError, ChannelError, NotifyError, UnsavableState
from upgrader.instance import image_in_fd_store
from upgrader.instance.declarations import Declarations
from upgrader.instance.frozen import Frozen, FrozenCrowd, spread
from upgrader.protocol import channel, connection_secrets, image
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno, identify
from upgrader.protocol.kinds import Kind
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import describe
from upgrader.protocol.state_codec import convert_for, save
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.own_unit import TIMEOUT

if TYPE_CHECKING:
    from upgrader.instance.rounds import Rounds

_TLS, _NEVER_LEFT = "TLS connection", "its secrets are never left with systemd"
_log = logging.getLogger("upgrader")


@dataclass(frozen=True, slots=True)
class Readers:
    """Which versions the next instance has: of states by name, of connections' states by listener."""

    states: Mapping[str, int] = field(default_factory=dict)
    sessions: Mapping[str, int] = field(default_factory=dict)
    crowds: bool = False  #: whether it takes those that are alike as columns


@dataclass(frozen=True, slots=True)
class Saved:
    """What was parked: FDs that crossed, and everything that was left behind."""

    generation: int
    fds: int
    left_behind: tuple[image.LeftBehind, ...]


def build(
    declarations: Declarations,
    generation: int,
    program: str,
    connections: Sequence[Frozen],
    busy: Sequence[image.LeftBehind],
    parameters: Mapping[str, str] | None = None,
    readers: Readers = Readers(),
    *,
    partial: bool = False,
    beyond: Sequence[tuple[str, HasFileno]] = (),
    withheld: Container[str] = (),
    held_at: int | None = None,
    rounds: Rounds | None = None,
) -> tuple[image.Manifest, list[HasFileno]]:
    """The manifest of this instance as it stands now, and the FDs in its order.

    `parameters`: what was set at run time, for the next instance to inherit. `readers`: what is
    known of the next instance; states are in all earlier forms for one that is not known.
    `partial`: a state that cannot be saved is left behind, because nobody can serve on with it.
    `beyond`: what PID 1 would pass to a start besides, by its FDNAME, as the last entries. `withheld`:
    backends of other kinds than sockets that do not move. `held_at`: since when nobody is served, in
    nanoseconds of CLOCK_MONOTONIC, if that is not now. `rounds`: what has copied tables, which are not
    in the manifest then.

    Raises UnsavableState for a state that cannot be saved, BackendError for a backend that cannot be
    described, OSError for a closed FD.
    """
    frozen_at = held_at or time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    entries: list[image.ManifestEntry] = []
    fds: list[HasFileno] = []
    for bound in declarations.sockets.values():  # the most valuable first
        sock = bound.socket
        entries.append(
            image.ManifestEntry(bound.name, bound.kind, identify(sock), path_inode(sock))
        )
        fds.append(sock)
    saving = _Saving(partial)
    described = saving.backends(declarations, withheld)
    for name in described:
        backend = declarations.backends[name]
        kind = backend.kind.kind
        entries += [image.ManifestEntry(name, kind, identify(fd)) for fd in backend.fds]
        fds += backend.fds
    states = saving.states(declarations, readers, rounds)
    sessions = _Sessions(declarations, readers, saving)
    over_tls = [frozen for frozen in connections if frozen.tls]
    if over_tls:  # the last ones: what is left with PID 1 ends before them
        connections = [frozen for frozen in connections if not frozen.tls] + over_tls
    for frozen in connections:
        state = sessions.convert(frozen, len(entries)) if sessions.converts else None
        entries.append(entry_of(frozen, state))
        fds.append(frozen.sock)
    tls = dict(enumerate((f.tls for f in over_tls if f.tls), len(entries) - len(over_tls)))
    if tls:
        from upgrader.protocol import secret_memory  # there since TLS was declared

        memory = secret_memory.write({place: secrets for place, (_, secrets) in tls.items()})
        entries.append(image.ManifestEntry("tls", Kind.SECRETS, identify(memory)))
        fds.append(memory)
    for name, owner in beyond:
        entries.append(image.ManifestEntry(name, Kind.PASSED, identify(owner)))
        fds.append(owner)
    passed = [bound.name for bound in declarations.sockets.values() if not bound.persistent]
    more: dict[str, Any] = (
        {"tls": {place: state for place, (state, _) in tls.items()}} if tls else {}
    )
    make = image.ManifestOverTls if tls else image.Manifest
    manifest = make(
        service=declarations.service,
        generation=generation,
        program=program,
        frozen_at=frozen_at,
        states=states,
        sessions=sessions.headers,
        entries=entries,
        left_behind=[*busy, *saving.left_behind],
        parameters=dict(parameters) if parameters else msgspec.UNSET,
        passed=passed or msgspec.UNSET,
        activated=declarations.activated or msgspec.UNSET,
        unsaved=saving.unsaved or msgspec.UNSET,
        earlier=sessions.earlier or msgspec.UNSET,
        drops=declarations.datagrams_dropped() or msgspec.UNSET,
        backends=described or msgspec.UNSET,
        **more,
    )
    return manifest, fds


def entry_of(frozen: Frozen, state: ConnectionState | None = None) -> image.ManifestEntry:
    """The entry of a connection, with this state in place of its own."""
    return image.ManifestEntry(
        frozen.listener, Kind.CONNECTION, frozen.identity, 0, state or frozen.state
    )


def secrets(generation: int, connections: Sequence[Frozen]) -> list[tuple[StoreName, Fd]]:
    """The FD with all that may be in no image, if there is anything, and its name in the FD store.

    Raises ImageError if it is too much, OSError when out of memory or FDs.
    """
    found = {each.identity.inode: each.secret for each in connections if each.secret}
    name = StoreName.of_secrets(generation)
    return [(name, connection_secrets.write(found))] if found else []


class _Saving:
    """Saves states and describes backends; if it is to be `partial`, what fails is left behind."""

    def __init__(self, partial: bool) -> None:
        self.left_behind: list[image.LeftBehind] = []
        self.unsaved: list[str] = []  # states
        self._partial = partial

    def states(
        self, declarations: Declarations, readers: Readers, rounds: Rounds | None
    ) -> list[SavedState]:
        """All states that can be saved."""
        saved = []
        for name, declared in declarations.states.items():
            try:
                if rounds and (lean := rounds.save(name, declared)):
                    saved.append(lean)
                    continue
                state = save(declared.value)
            except UnsavableState as error:
                if not self._partial:
                    raise
                self.left_behind.append(image.LeftBehind(name, "state", error.reason))
                self.unsaved.append(name)
            else:
                saved.append(self.convert(declared.cls, state, readers.states.get(name)))
        return saved

    def backends(
        self, declarations: Declarations, withheld: Container[str]
    ) -> dict[str, image.BackendFacts]:
        """What is said of all backends that move and are no sockets."""
        described = {}
        for name, backend in declarations.backends.items():
            if name in withheld:
                why = "backend-transfer=no"
                self.left_behind.append(image.LeftBehind(name, backend.kind.kind, why))
                continue
            try:
                described[name] = backend.describe()
            except BackendError as error:
                if not self._partial:
                    raise
                self.left_behind.append(image.LeftBehind(name, backend.kind.kind, error.message))
        return described

    def convert(self, cls: type, saved: SavedState, reader: int | None) -> SavedState:
        """A state as the next instance wants it, or else as it is: only a downgrade fails then."""
        try:
            return convert_for(cls, saved, reader)
        except UnsavableState as error:
            if not self._partial:
                raise
            _log.error("%s", error)
            return saved


class _Sessions:
    """The states of connections, as the next instance wants them."""

    def __init__(self, declarations: Declarations, readers: Readers, saving: _Saving) -> None:
        self._saving = saving
        self.headers = declarations.sessions()
        self.earlier: dict[int, dict[int, bytes]] = {}
        self._readers = readers.sessions
        self._classes = {
            listener: cls
            for listener, connections in declarations.connections.items()
            if (cls := connections.session) and describe(cls).backward
        }
        self._plain = dict(self.headers)
        self.converts = bool(self._classes)  #: whether one may be wanted in another form

    def convert(self, frozen: Frozen, place: int) -> ConnectionState:
        """What goes with a connection that is entry number `place`."""
        listener, state = frozen.listener, frozen.state
        if listener not in self._classes:
            return state
        plain = msgspec.structs.replace(self._plain[listener], data=state.session)
        saved = self._saving.convert(self._classes[listener], plain, self._readers.get(listener))
        if saved.earlier:
            self.earlier[place] = saved.earlier
        self.headers[listener] = msgspec.structs.replace(saved, data=b"", earlier=msgspec.UNSET)
        return msgspec.structs.replace(state, session=saved.data)


def keep(
    manifest: image.Manifest,
    fds: Sequence[HasFileno],
    store: FdStore,
    unit: str,
    *,
    one_by_one: bool,
    there: Container[str] = (),
) -> Saved:
    """Leave an image with PID 1 for the next instance: on one channel, or one FD after the other.
    `there`: backends of other kinds than sockets of which PID 1 has all FDs.

    Raises as `park`. Where the FD store has no room for all of them, it is a channel after all.
    """
    if one_by_one:
        try:
            count = image_in_fd_store.keep(manifest, fds, store, unit, there)
            return Saved(manifest.generation, count, tuple(manifest.left_behind))
        except (ChannelError, NotifyError) as error:
            _log.warning("parked on a channel, not as backend-transfer-mechanism says: %s", error)
    name = StoreName(Stored.CHANNEL, str(manifest.generation))
    return park(manifest, fds, name, store, unit)


def park(
    manifest: image.Manifest,
    fds: Sequence[HasFileno],
    name: StoreName,
    store: FdStore,
    unit: str,
    *,
    whole: bool = False,
) -> Saved:
    """Park an image in the FD store under `name`. `whole`: it is worth nothing with less than all FDs.

    Raises UpgradeError or OSError when it cannot be done; nothing is lost then, and nothing of it
    is left in the FD store.
    """
    names: list[StoreName] = []

    def keep(reader: socket) -> None:
        names.append(name.further(len(names)))
        push(store, unit, names[-1], reader)

    try:
        saved = carry(manifest, fds, keep)
        if whole and saved.fds < len(fds):
            raise ChannelError(
                f"only {saved.fds} of {len(fds)} FDs could be parked",
                remedy="raise LimitNOFILE= of this service",
            )
        return saved
    except BaseException:
        store.remove(*names)
        raise


def carry(
    manifest: image.Manifest, fds: Sequence[HasFileno], keep: Callable[[socket], None]
) -> Saved:
    """Write an image into a channel that nobody reads yet; `keep` gets the end to be read, and that of
    each further channel where one is full.

    Raises UpgradeError or OSError when it cannot be done, and whatever `keep` raises.
    """
    with image.seal(manifest) as memfd:
        parked = channel.park(manifest.generation, memfd, fds, keep)
    entries = manifest.entries[parked.sent :]
    cut = [image.LeftBehind(e.backend, str(e), parked.reason) for e in entries]
    return Saved(manifest.generation, parked.sent, (*manifest.left_behind, *cut))


def insurance(
    manifest: image.Manifest,
    fds: Sequence[HasFileno],
    once: Container[str] = (),
    pieces: Sequence[Fd] = (),
) -> tuple[image.Manifest, list[HasFileno]]:
    """What of an image may be replayed after the next instance has served: no connection, and none of
    the backends whose facts hold only `once`. `pieces`: those of tables, the very memfds.

    A connection that has gone on since would get bytes twice, and its duplicate in a parked queue
    would hide from the client that it was closed.
    """
    manifest, fds = lasting(manifest, fds)
    kept = [
        i
        for i, entry in enumerate(manifest.entries)
        if entry.connection is None and entry.backend not in once
    ]
    entries = [manifest.entries[i] for i in kept]
    described = {n: facts for n, facts in (manifest.backends or {}).items() if n not in once}
    lean = msgspec.structs.replace(
        manifest, entries=entries, left_behind=[], earlier=msgspec.UNSET,
        backends=described or msgspec.UNSET,
    )  # fmt: skip
    entries += [image.ManifestEntry("table", Kind.TABLE, identify(piece)) for piece in pieces]
    return lean, [*(fds[i] for i in kept), *pieces]


def lasting(
    manifest: image.Manifest, fds: Sequence[HasFileno]
) -> tuple[image.Manifest, list[HasFileno]]:
    """What of an image is left with PID 1: it passes the rest anyway, but for TLS connections. Those
    are never left: who had them may have sealed records already, and must not be followed by another."""
    tls = manifest.tls or {}
    beyond = {Kind.PASSED, Kind.SECRETS}
    own = [
        entry
        for place, entry in enumerate(manifest.entries)
        if entry.kind not in beyond and place not in tls
    ]
    kept = msgspec.structs.replace(manifest, entries=own)
    if tls:
        lost = [image.LeftBehind(manifest.entries[i].backend, _TLS, _NEVER_LEFT) for i in tls]
        left = [*kept.left_behind, *lost]
        kept = msgspec.structs.replace(kept, left_behind=left, tls=msgspec.UNSET)
    return kept, list(fds[: len(own)])


def one_by_one(
    manifest: image.Manifest, fds: Sequence[HasFileno], crowds: Sequence[FrozenCrowd]
) -> tuple[image.Manifest, list[HasFileno]]:
    """With an entry for each connection of these crowds, as every version can load."""
    members = spread(crowds)
    entries = [*manifest.entries, *map(entry_of, members)]
    whole = msgspec.structs.replace(manifest, entries=entries)
    return whole, [*fds, *(each.sock for each in members)]


def push(store: FdStore, unit: str, name: StoreName, reader: socket) -> None:
    """Store a channel, and ask whether it is there: PID 1 drops what it cannot store in silence.

    Raises ChannelError if it is not, NotifyError if PID 1 cannot be told.
    """
    try:
        with Bus(TIMEOUT) as bus:
            before = bus.stored_fds(unit)
            store.push(name, reader)
            after = bus.stored_fds(unit)
    except BusError:
        store.push(name, reader)  # pushed twice is stored once
        return
    if after <= before:
        raise ChannelError(
            f"the FD store of {unit} did not take the channel ({after} FDs in it)",
            remedy="set FileDescriptorStoreMax= and NotifyAccess=main or exec in the unit",
        )
