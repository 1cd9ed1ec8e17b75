# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image: everything one migration moves, encoded once into one sealed memfd.

A fixed header (magic, format, checksum, length), then one msgpack document, the `Manifest`.
The FDs themselves travel beside it; the manifest names each one, in the order they are sent.
"""

import errno
import fcntl
import os
import struct
import zlib

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity
from upgrader.protocol.kinds import Kind
from upgrader.protocol.saved_state import SavedState

MAGIC = b"UPGRADER"
FORMAT = 1
#: Largest manifest, in bytes: a bound on what a damaged header can make us allocate.
MAX_BYTES = 1 << 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

_HEADER = struct.Struct("!8sIIQ")  # magic, format, crc32 of the document, its length in bytes


class ManifestEntry(msgspec.Struct, frozen=True, array_like=True):
    """One FD: the backend that declared it, what it is, and what goes with it.

    `path_inode` is the inode of the socket file of a UNIX listener, 0 where there is none.
    """

    backend: str
    kind: Kind
    identity: Identity
    path_inode: int = 0
    connection: ConnectionState | None = None

    def __str__(self) -> str:
        return f"{self.kind} of {self.backend!r}"


class LeftBehind(msgspec.Struct, frozen=True, array_like=True):
    """Something the source could not move: it was drained or cut there, and why."""

    backend: str
    what: str
    why: str


class Manifest(msgspec.Struct, frozen=True):
    """What is in the image. `generation` counts the migrations of this service, from 1 on.

    `sessions` holds, for each backend with connections, the version of the author's state that
    goes with them (its `data` is empty). `frozen_at` is CLOCK_MONOTONIC in nanoseconds: the
    instant from which new work is held. `parameters` were set at run time, and are inherited.
    `passed`: the backends that `.socket` units passed; `activated`: all of those, in words.
    `drops`: how many datagrams the kernel had dropped of each datagram socket, by its inode.
    `unsaved`: states that could not be saved; `left_behind` says why. `earlier`: for an entry, by its place, the state of its connection as earlier versions had it.
    """

    service: str
    generation: int
    program: str
    frozen_at: int
    states: list[SavedState] = []
    sessions: dict[str, SavedState] = {}
    entries: list[ManifestEntry] = []
    left_behind: list[LeftBehind] = []
    #: Only there if any was set: an image of format 1 without them has the same bytes as ever.
    parameters: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    passed: list[str] | msgspec.UnsetType = msgspec.UNSET
    activated: list[str] | msgspec.UnsetType = msgspec.UNSET
    unsaved: list[str] | msgspec.UnsetType = msgspec.UNSET
    earlier: dict[int, dict[int, bytes]] | msgspec.UnsetType = msgspec.UNSET
    drops: dict[int, int] | msgspec.UnsetType = msgspec.UNSET


def seal(manifest: Manifest) -> Fd:
    """Write a manifest into a new sealed memfd.

    Raises ImageError for one that could not be read again, OSError when out of memory or FDs.
    """
    try:
        document = msgspec.msgpack.encode(manifest)
    except (ValueError, OverflowError) as error:  # msgpack's own limits: 4 GiB, text in UTF-8
        raise ImageError("image", f"cannot be encoded: {error}") from error
    if len(document) > MAX_BYTES:
        raise ImageError("image", f"of {len(document)} bytes is too large (limit {MAX_BYTES})")
    header = _HEADER.pack(MAGIC, FORMAT, zlib.crc32(document), len(document))
    memfd = Fd(os.memfd_create("upgrader-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    view = memoryview(header + document)
    while view:
        view = view[os.write(memfd.fileno(), view) :]
    protect(memfd)
    return memfd


def checksum(memfd: Fd) -> int:
    """The checksum in the header of an image: the CRC-32 of its manifest. Raises ImageError."""
    header = os.pread(memfd.fileno(), _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise ImageError("image", f"truncated: {len(header)} of {_HEADER.size} header bytes")
    return int(_HEADER.unpack(header)[2])


def protect(memfd: Fd) -> None:
    """Seal a memfd: it never changes any more."""
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, SEALS)


def unseal(memfd: Fd) -> Manifest:
    """Read a manifest; raises ImageError that says what is wrong with it.

    Only `pread` is used: the file offset belongs to every process that holds the memfd.
    """
    number = memfd.fileno()
    try:
        seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        raise ImageError("image", "is not a memfd") from error
    if seals & SEALS != SEALS:
        raise ImageError("image", "is not sealed: it could change while it is read")
    header = os.pread(number, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        raise ImageError("image", f"truncated: {len(header)} of {_HEADER.size} header bytes")
    magic, version, checksum, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ImageError("image", f"starts with {magic!r}, not {MAGIC!r}")
    if version != FORMAT:
        raise ImageError(
            "image",
            f"format {version} is unknown, this library reads format {FORMAT}",
            remedy="start a version whose library can read it; the image is kept",
        )
    held = os.fstat(number).st_size - _HEADER.size
    if length > MAX_BYTES or held != length:
        raise ImageError("image", f"truncated: {held} of {length} bytes (limit {MAX_BYTES})")
    document = os.pread(number, length, _HEADER.size)
    if zlib.crc32(document) != checksum:
        raise ImageError("image", "checksum does not match")
    try:
        return msgspec.msgpack.decode(document, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ImageError("image", f"manifest does not decode: {error}") from error
