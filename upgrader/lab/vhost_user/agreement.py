# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program and a storage daemon agree on before the first request: QEMU,
docs/interop/vhost-user.rst."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Annotated, NamedTuple

from msgspec import Meta

from upgrader.lab.vhost_user import split_ring
from upgrader.lab.vhost_user.messages import DaemonError, MessageType, ProtocolFeature

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upgrader.lab.vhost_user.messages import DaemonSocket
    from upgrader.protocol.fd import Fd

_READ_ONLY, FLUSH = 1 << 5, 1 << 9  # VIRTIO_BLK_F_*
_PROTOCOL, _MODERN = 1 << 30, 1 << 32  # VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1
_NEEDED = _PROTOCOL | _MODERN
_KNOWN = _NEEDED | _READ_ONLY | FLUSH
_CONFIG = struct.Struct("<IIIQ")  # offset, size and flags; then the capacity
_INFLIGHT = struct.Struct("<QQHH4x")  # size and offset, rings, descriptors of each
_UNPADDED = _INFLIGHT.size - 4
_LARGEST_INFLIGHT = 1 << 24  # bytes; it takes 16 for each descriptor

#: What each FD is, in this order. What wakes the program comes first, so that it is `fileno()`.
CALL, CONNECTION, MEMORY, KICK, INFLIGHT = "call", "connection", "memory", "kick", "inflight"
PARTS = (CALL, CONNECTION, MEMORY, KICK, INFLIGHT)

_Number = Annotated[int, Meta(ge=0)]


class Agreement(NamedTuple):
    """Features of the disk and of the protocol, `capacity` in sectors, and where in its file the region
    lies that knows what is in flight, in bytes."""

    features: _Number = 0
    protocol: _Number = 0
    capacity: _Number = 0
    size: _Number = 0
    offset: _Number = 0

    @property
    def keeps_in_flight(self) -> bool:
        """Whether there is such a region."""
        return bool(self.protocol & ProtocolFeature.INFLIGHT_SHMFD)

    @property
    def unknown(self) -> int:
        """Features that no program of this version has agreed on."""
        return self.features & ~_KNOWN | self.protocol & ~sum(ProtocolFeature)


def agree(daemon: DaemonSocket, before: Agreement | None) -> Agreement:
    """Agree on the features: on those of `before` with a daemon that comes in the place of another one.
    Raises DaemonError if that lacks some, or has a smaller disk."""
    offered = daemon.ask_number(MessageType.GET_FEATURES)
    features = before.features if before else _NEEDED | offered & _KNOWN
    if features & ~offered:
        raise DaemonError(MessageType.GET_FEATURES, f"lacks {features & ~offered:#x}")
    daemon.tell(MessageType.SET_OWNER)
    offered = daemon.ask_number(MessageType.GET_PROTOCOL_FEATURES)
    known = sum(ProtocolFeature)
    protocol = before.protocol if before else ProtocolFeature.CONFIG | offered & known
    if protocol & ~offered:
        raise DaemonError(MessageType.GET_PROTOCOL_FEATURES, f"lacks {protocol & ~offered:#x}")
    daemon.tell_number(MessageType.SET_PROTOCOL_FEATURES, protocol)
    daemon.acknowledges = bool(protocol & ProtocolFeature.REPLY_ACK)
    daemon.tell_number(MessageType.SET_FEATURES, features)
    asked = _CONFIG.pack(0, 8, 0, 0)
    answer = daemon.ask(MessageType.GET_CONFIG, asked, sizes=[_CONFIG.size])
    capacity = _CONFIG.unpack(answer)[3]
    if before:
        if capacity < before.capacity:
            why = f"has {capacity} sectors, and {before.capacity} were there"
            raise DaemonError(MessageType.GET_CONFIG, why)
        return before
    return Agreement(features, protocol, capacity)


def ask_for_region(daemon: DaemonSocket, agreed: Agreement) -> tuple[Agreement, Fd]:
    """The region in which a daemon notes what is in flight, for the one that comes after it. Raises
    DaemonError."""
    asked = _INFLIGHT.pack(0, 0, 1, split_ring.QUEUE)
    sizes = [_INFLIGHT.size, _UNPADDED]
    answer, fd = daemon.ask_fd(MessageType.GET_INFLIGHT_FD, asked, sizes=sizes)
    size, offset, _, _ = _INFLIGHT.unpack(answer.ljust(_INFLIGHT.size, b"\0"))
    there = os.fstat(fd.fileno()).st_size
    if not 0 < size <= _LARGEST_INFLIGHT or offset + size > there:
        why = f"has {size} bytes at {offset} of a file of {there}"
        raise DaemonError(MessageType.GET_INFLIGHT_FD, why)
    return agreed._replace(size=size, offset=offset), fd


def start(daemon: DaemonSocket, agreed: Agreement, fds: Mapping[str, int], used: int) -> None:
    """Give a daemon the ring; it goes on after `used` answers. Raises DaemonError."""
    numbers = struct.Struct("<II").pack
    if agreed.keeps_in_flight:
        region = _INFLIGHT.pack(agreed.size, agreed.offset, 1, split_ring.QUEUE)
        daemon.tell(MessageType.SET_INFLIGHT_FD, region, [fds[INFLIGHT]])
    base = split_ring.BASE
    table = struct.pack("<IIQQQQ", 1, 0, base, split_ring.SIZE, base, 0)
    daemon.tell(MessageType.SET_MEM_TABLE, table, [fds[MEMORY]])
    daemon.tell(MessageType.SET_VRING_NUM, numbers(0, split_ring.QUEUE))
    daemon.tell(MessageType.SET_VRING_BASE, numbers(0, used))
    places = (split_ring.DESCRIPTORS, split_ring.USED, split_ring.AVAILABLE)
    addresses = struct.pack("<IIQQQQ", 0, 0, *(base + place for place in places), 0)
    daemon.tell(MessageType.SET_VRING_ADDR, addresses)
    daemon.tell_number(MessageType.SET_VRING_CALL, 0, [fds[CALL]])
    daemon.tell_number(MessageType.SET_VRING_KICK, 0, [fds[KICK]])
    daemon.tell(MessageType.SET_VRING_ENABLE, numbers(0, 1))
