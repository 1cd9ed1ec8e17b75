# SPDX-License-Identifier: LGPL-2.1-or-later
"""A piece of a round: keys of one table with their values, or without, in a sealed memfd.

Header as that of an image, then frames: the length of each as four bytes, and msgpack. The first one
is the `Head`, each further one a pair: a map of what was set, and a list of keys that are gone.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Generator, Iterator, Sequence

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol import image
from upgrader.protocol.fd import Fd

MAGIC = b"UPGRTABL"
FORMATS = (1,)
#: Bytes after which a piece is full: a destination loads it in some ten milliseconds.
SIZE = 8 << 20
#: Most pieces of one migration: each is an FD, and all of them may be left with PID 1.
MOST = 1000

_LENGTH = struct.Struct("!I")


class Head(msgspec.Struct, frozen=True, array_like=True):
    """Of which table a piece is: the field of a state, as `version` and `shape` of it have it."""

    state: str
    field: str
    version: int
    shape: int


class Piece(msgspec.Struct, frozen=True):
    """A piece that is sealed. `checksum`: the CRC-32 of what is behind the header; `bytes`: of that."""

    head: Head
    memfd: Fd
    checksum: int
    bytes: int


class Writing:
    """A piece that is being written; raises OSError if memory or FDs run out."""

    def __init__(self, head: Head) -> None:
        self.bytes = 0
        self._head = head
        self._checksum = 0
        self._memfd = Fd(os.memfd_create("upgrader-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.write(self._memfd.fileno(), bytes(image.HEADER.size))
        self._frame(msgspec.msgpack.encode(head))

    def add(self, values: dict[object, object], gone: Sequence[object]) -> int:
        """Add what was set, and what is gone; returns how many bytes that is. Raises what msgspec
        raises for a value that cannot be encoded."""
        return self._frame(msgspec.msgpack.encode((values, gone)))

    def seal(self) -> Piece:
        """The piece; nothing can be added any more."""
        header = image.HEADER.pack(MAGIC, FORMATS[-1], self._checksum, self.bytes)
        os.pwrite(self._memfd.fileno(), header, 0)
        image.protect(self._memfd)
        return Piece(self._head, self._memfd, self._checksum, self.bytes)

    def _frame(self, data: bytes) -> int:
        for part in (_LENGTH.pack(len(data)), data):
            self._checksum = zlib.crc32(part, self._checksum)
            view = memoryview(part)
            while view:
                view = view[os.write(self._memfd.fileno(), view) :]
        self.bytes += _LENGTH.size + len(data)
        return _LENGTH.size + len(data)


@contextlib.contextmanager
def opened(memfd: Fd, item: str) -> Iterator[tuple[Head, int, Iterator[memoryview]]]:
    """The head of a piece, its checksum, and the frames behind it, each to be decoded while this is
    open. Raises ImageError for what is no piece, and names it `item`."""
    with image.opened(memfd, item, MAGIC, FORMATS) as (document, _, checksum):
        frames = _frames(document, item)
        with contextlib.closing(frames):  # the last one of them is a part of the document
            try:
                head = msgspec.msgpack.decode(next(frames, b""), type=Head)
            except (msgspec.MsgspecError, ValueError) as error:
                raise ImageError(item, f"its head does not decode: {error}") from error
            yield head, checksum, frames


def _frames(document: memoryview, item: str) -> Generator[memoryview]:
    at = 0
    while at < len(document):
        with document[at : at + _LENGTH.size] as prefix:
            if len(prefix) < _LENGTH.size:
                raise ImageError(item, "ends inside a frame")
            (length,) = _LENGTH.unpack(prefix)
        at += _LENGTH.size
        if length > len(document) - at:
            raise ImageError(
                item, f"claims a frame of {length} bytes, {len(document) - at} are left"
            )
        with document[at : at + length] as frame:
            yield frame
        at += length
