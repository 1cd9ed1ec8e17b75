# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a storage daemon says, writes into the ring, and what another version says of the ring."""

import mmap
import os
import socket
import struct

import msgspec

from tests.fuzz.fuzz import Decoder
from tests.fuzz.mutations import change_bytes, change_msgpack
from upgrader.errors import BackendError, RefusedError
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.lab.vhost_user import DaemonError, Operation, RingError, VhostUserDisk
from upgrader.lab.vhost_user.agreement import Agreement, agree, ask_for_region, start
from upgrader.lab.vhost_user.messages import DaemonSocket
from upgrader.lab.vhost_user.split_ring import SIZE, USED, Asked, SplitRing
from upgrader.protocol.fd import Fd

_ASKED = {slot: Asked(Operation.READ, 8 * slot, 4096, slot + 1) for slot in range(3)}
_STATUS = (0x3000 + 16, 0x3020 + 16, 0x3040 + 16)


def _conversation() -> bytes:
    """All answers of a daemon that has nothing special."""
    answers = [
        (1, struct.pack("<Q", 1 << 30 | 1 << 32)), (15, struct.pack("<Q", 1 << 9)),
        (24, struct.pack("<IIIQ", 0, 8, 0, 32768)),
    ]  # fmt: skip
    return b"".join(struct.pack("<III", n, 5, len(body)) + body for n, body in answers)


def _answers(data: bytes) -> None:
    """As they come, whatever was asked."""
    here, there = socket.socketpair()
    with here, there, Fd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as memory:
        there.setblocking(False)
        there.send(data[:100_000])
        there.shutdown(socket.SHUT_WR)
        with DaemonSocket(here.fileno(), 1) as daemon:
            agreed = agree(daemon, None)
            if agreed.keeps_in_flight:
                ask_for_region(daemon, agreed)[1].close()
            numbers = dict.fromkeys(("call", "kick", "memory", "inflight"), memory.fileno())
            start(daemon, agreed, numbers, 0)


def _ring(data: bytes) -> None:
    """Three bytes for how each went, then the used ring."""
    memory = mmap.mmap(-1, SIZE)
    for place, status in zip(_STATUS, data[:3], strict=False):
        memory[place] = status
    used = data[3:1000]
    memory[USED : USED + len(used)] = used
    ring = SplitRing(memory, 3, 0, _ASKED)
    ring.take()


def _stood(data: bytes) -> None:
    """Used, if it fits."""
    disk = VhostUserDisk("/disk.sock")
    said = DeclaredBackend("disk", disk)._decode(data)
    disk.verify(_MEMORY.fileno(), said)
    if "ring" in said:
        stood = said["ring"]
        SplitRing(mmap.mmap(-1, SIZE), stood["available"], stood["used"], stood["asked"])


_MEMORY = Fd(VhostUserDisk("/disk.sock")._kinds["memory"].open())


def disk_decoders() -> list[Decoder]:
    """All of them."""
    used = b"\0\0\0" + struct.pack("<HHIIII", 0, 2, 6, 4097, 0, 4097)
    ring = {"agreed": Agreement(1 << 32, 1 << 9, 32768), "available": 3, "used": 0, "asked": _ASKED}
    facts = VhostUserDisk("/disk.sock")._describe("memory", _MEMORY.fileno())
    return [
        Decoder("answers of a storage daemon", _answers, (DaemonError,), [_conversation()], change_bytes),
        Decoder("ring of a storage daemon", _ring, (RingError,), [used], change_bytes),
        Decoder("facts of a disk", _stood, (RefusedError, BackendError),
                [msgspec.msgpack.encode({**facts, "ring": ring})], change_msgpack),
    ]  # fmt: skip
