# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests of a virtio block device in memory that is shared with who answers them: virtio 1.2, sections
2.7 (split virtqueues) and 5.2 (block devices). Nothing that the other side writes is trusted.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

from msgspec import Meta

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping

QUEUE = 64  #: descriptors
SLOTS = QUEUE // 3  #: requests at a time: a header, the data, and a byte for how it went, for each
SECTOR = 512  #: bytes
LARGEST = 64 << 10  #: bytes of the data of one request

#: Where things lie in the memory, in bytes from its beginning.
DESCRIPTORS, AVAILABLE, USED, _HEADERS, _DATA = 0, 0x1000, 0x2000, 0x3000, 0x10000
SIZE = _DATA + SLOTS * LARGEST  #: bytes of the memory
#: Where the memory lies for the other side: as well as any other place, but never 0.
BASE = 1 << 32

_DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, the next one
_NEXT, _WRITE = 1, 2  # VIRTQ_DESC_F_*
_HEADER = struct.Struct("<IIQ")  # operation, 0, sector
_HEADER_ROOM = 32
_ANSWER = struct.Struct("<II")  # the first descriptor, bytes written
_INDEX = 0xFFFF  # indices are of 16 bits, and never reset


class Operation(IntEnum):
    """What is asked for, VIRTIO_BLK_T_*."""

    READ, WRITE, FLUSH = 0, 1, 4


class Asked(NamedTuple):
    """A request that is not answered yet; `length` in bytes, `tag` is the program's own number."""

    operation: Operation
    sector: Annotated[int, Meta(ge=0)]
    length: Annotated[int, Meta(ge=0, le=LARGEST)]
    tag: int


class Answered(NamedTuple):
    """A request and its answer; `status`: 0, 1 if it failed, 2 if the device cannot do that. `data` is
    what was read."""

    tag: int
    operation: Operation
    sector: int
    status: int
    data: bytes


class RingError(Exception):
    """The other side has written into the ring what nobody has asked for."""


class SplitRing:
    """One ring, as it stands: `available` and `used` count what was asked and what was taken of the
    answers, `asked` has the rest by its slot. A new one: 0, 0 and nothing."""

    def __init__(
        self, memory: mmap.mmap, available: int, used: int, asked: Mapping[int, Asked]
    ) -> None:
        self.available, self.used = available, used
        self.asked = dict(asked)
        self._free = [slot for slot in range(SLOTS) if slot not in self.asked]
        self._memory = memory
        # struct.pack_into writes zeros first, and the other side could read them: this is one store.
        # That the stores before it are seen before it is so on x86.
        self._numbers = memoryview(memory).cast("H")

    @property
    def room(self) -> int:
        """How many more requests fit."""
        return len(self._free)

    def ask(self, request: Asked, data: bytes) -> None:
        """Put a request there; `data` is what it writes. The caller has looked for room."""
        slot = self._free.pop()
        head, data_at = _HEADERS + slot * _HEADER_ROOM, _DATA + slot * LARGEST
        _HEADER.pack_into(self._memory, head, request.operation, 0, request.sector)
        self._memory[head + _HEADER.size] = 0xFF  # no status
        self._memory[data_at : data_at + len(data)] = data
        parts = [(head, _HEADER.size, 0)]
        if request.length:
            reads = request.operation == Operation.READ
            parts.append((data_at, request.length, _WRITE if reads else 0))
        parts.append((head + _HEADER.size, 1, _WRITE))
        for place, (address, length, flags) in enumerate(parts):
            number = slot * 3 + place
            last = place == len(parts) - 1
            _DESCRIPTOR.pack_into(
                self._memory, DESCRIPTORS + number * _DESCRIPTOR.size, BASE + address, length,
                flags | (0 if last else _NEXT), 0 if last else number + 1,
            )  # fmt: skip
        self._numbers[(AVAILABLE + 4) // 2 + self.available % QUEUE] = slot * 3
        self.available = (self.available + 1) & _INDEX
        self.asked[slot] = request
        self._numbers[(AVAILABLE + 2) // 2] = self.available

    @property
    def written(self) -> int:
        """How far the other side has come with its answers."""
        return self._numbers[(USED + 2) // 2]

    def take(self) -> list[Answered]:
        """The answers that have come. Raises RingError."""
        count = (self.written - self.used) & _INDEX
        if count > len(self.asked):
            raise RingError(f"{count} answers to {len(self.asked)} requests")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> Answered:
        place = USED + 4 + self.used % QUEUE * _ANSWER.size
        first, _ = _ANSWER.unpack_from(self._memory, place)
        slot, rest = divmod(first, 3)
        if rest or slot not in self.asked:
            raise RingError(f"an answer to descriptor {first}, which nobody has asked")
        asked = self.asked[slot]
        status = self._memory[_HEADERS + slot * _HEADER_ROOM + _HEADER.size]
        if status > 2:
            raise RingError(f"an answer to request {asked.tag} with status {status}")
        read = asked.length if asked.operation == Operation.READ and not status else 0
        data = self._memory[_DATA + slot * LARGEST : _DATA + slot * LARGEST + read]
        del self.asked[slot]
        self._free.append(slot)
        self.used = (self.used + 1) & _INDEX
        return Answered(asked.tag, asked.operation, asked.sector, status, data)
