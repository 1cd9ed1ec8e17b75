# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parking an instance: state and FDs into an image, the image into a channel that PID 1 holds.

Saving changes and destroys nothing: until PID 1 holds the channel, this instance can go on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket

import msgspec

from upgrader import channel, image
from upgrader.backends import ConnectionState, Identity, Kind, identify, path_inode
from upgrader.backends.fd import HasFileno
from upgrader.declarations import Declarations
from upgrader.errors import BusError, ChannelError
from upgrader.state import header, save
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.stop import TIMEOUT


class Frozen(msgspec.Struct, frozen=True):
    """A connection at a safe point: everything that moves with it."""

    door: str
    sock: socket
    identity: Identity
    state: ConnectionState


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was parked: FDs that crossed, and everything that was left behind."""

    generation: int
    fds: int
    left_behind: tuple[image.LeftBehind, ...]


def park(
    declarations: Declarations,
    generation: int,
    program: str,
    connections: Sequence[Frozen],
    busy: Sequence[image.LeftBehind],
    store: FdStore,
    unit: str,
) -> Outcome:
    """Freeze this instance into a parked image.

    Raises UpgradeError or OSError when it cannot be done; nothing is lost then, and nothing of it
    is left in the FD store.
    """
    frozen_at = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    entries: list[image.Entry] = []
    fds: list[HasFileno] = []
    for bound in declarations.sockets.values():  # the most valuable first
        sock = bound.socket
        entries.append(image.Entry(bound.name, bound.kind, identify(sock), path_inode(sock)))
        fds.append(sock)
    for frozen in connections:
        kind = Kind.CONNECTION
        entries.append(image.Entry(frozen.door, kind, frozen.identity, 0, frozen.state))
        fds.append(frozen.sock)
    manifest = image.Manifest(
        service=declarations.service,
        generation=generation,
        program=program,
        frozen_at=frozen_at,
        states=[save(declared.value) for declared in declarations.states.values()],
        sessions={
            name: header(connections.session)
            for name, connections in declarations.connections.items()
            if connections.session is not None
        },
        entries=entries,
        left_behind=list(busy),
    )
    name = StoreName(Stored.CHANNEL, str(generation))
    with image.seal(manifest) as memfd:
        try:
            parked = channel.park(
                generation, memfd, fds, lambda reader: _store(store, unit, name, reader)
            )
        except BaseException:
            store.remove(name)
            raise
    cut = [image.LeftBehind(e.backend, str(e), parked.reason) for e in entries[parked.sent :]]
    return Outcome(generation, parked.sent, (*busy, *cut))


def _store(store: FdStore, unit: str, name: StoreName, reader: socket) -> None:
    """Push the channel, and ask whether it is there: PID 1 drops what it cannot store in silence."""
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
