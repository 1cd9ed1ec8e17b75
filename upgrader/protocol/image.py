# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image: everything one migration moves, encoded once into one sealed memfd.

A fixed header (magic, format, checksum, length), then one msgpack document, the `Manifest`.
The FDs themselves travel beside it; the manifest names each one, in the order they are sent.
"""

import errno
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.crowd import Crowd
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity
from upgrader.protocol.kinds import Kind
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.tls_state import TlsState

MAGIC = b"UPGRADER"
#: Formats that are read. 2: kinds of backends that version 0.1.0 does not know, and their facts; 3:
#: states of which the tables are apart; 4: connections that are alike, as columns. An older library refuses
#: that by number, and the image is kept.
FORMATS = (1, 2, 3, 4)
#: The format from which on connections come as columns.
CROWDS = 4
#: Largest manifest, in bytes: a bound on what a damaged header can make us allocate.
MAX_BYTES = 1 << 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

#: Private, as kernels before 6.7 share nothing that is sealed against writing; all of it at once.
_MAPPED = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
#: Magic, format, crc32 of the document, its length in bytes.
HEADER = struct.Struct("!8sIIQ")


class ManifestEntry(msgspec.Struct, frozen=True, array_like=True):
    """One FD: the backend that declared it, what it is, and what goes with it.

    `path_inode` is the inode of the socket file of a UNIX listener, 0 where there is none.
    """

    backend: str
    kind: str
    identity: Identity
    path_inode: int = 0
    connection: ConnectionState | None = None

    @property
    def is_declared_by_kind(self) -> bool:
        """Whether `BackendKind` has described it, and not this library what sockets are."""
        return self.kind not in _SOCKETS

    def __str__(self) -> str:
        return f"{self.kind} of {self.backend!r}"


class BackendFacts(msgspec.Struct, frozen=True, array_like=True):
    """What a kind of `version` has described, readable from `readable_from` on: for each FD of a
    backend, in the order of its entries, a msgpack map."""

    version: int
    readable_from: int
    facts: list[bytes]


class LeftBehind(msgspec.Struct, frozen=True, array_like=True):
    """Something the source could not move: it was drained or cut there, and why."""

    backend: str
    what: str
    why: str


_SOCKETS = frozenset(Kind)


class Manifest(msgspec.Struct, frozen=True):
    """What is in the image. `generation` counts the migrations of this service, from 1 on.

    `sessions` holds, for each backend with connections, the version of the author's state that
    goes with them (its `data` is empty). `frozen_at` is CLOCK_MONOTONIC in nanoseconds: the
    instant from which new work is held. `parameters` were set at run time, and are inherited.
    `passed`: the backends that `.socket` units passed; `activated`: all of those, in words.
    `drops`: how many datagrams the kernel had dropped of each datagram socket, by its inode.
    `unsaved`: states that could not be saved; `left_behind` says why. `earlier`: for an entry, by its
    place, the state of its connection as earlier versions had it. `backends`: the facts of those of
    other kinds than sockets, by name; with them it is format 2.
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
    backends: dict[str, BackendFacts] | msgspec.UnsetType = msgspec.UNSET

    @property
    def count(self) -> int:
        """How many FDs it is of."""
        return len(self.entries) + sum(map(len, self.crowds or ()))

    @property
    def tls(self) -> dict[int, TlsState] | msgspec.UnsetType:
        """What goes with TLS connections, by the place of an entry."""
        return msgspec.UNSET

    @property
    def crowds(self) -> list[Crowd] | msgspec.UnsetType:
        """Connections that are alike, whose FDs come after those of all entries."""
        return msgspec.UNSET

    @property
    def format(self) -> int:
        """The oldest format that has all of it."""
        if self.crowds:
            return CROWDS
        if any(state.tables for state in self.states):
            return 3
        return 2 if self.backends else 1


class ManifestOverTls(Manifest, frozen=True):
    """With TLS connections; their secrets are apart. A manifest of its own, because one more field in
    all of them would change the bytes of all of them."""

    tls: dict[int, TlsState] | msgspec.UnsetType = msgspec.UNSET


class ManifestInColumns(ManifestOverTls, frozen=True):
    """With connections that are alike, for the same reason."""

    crowds: list[Crowd] | msgspec.UnsetType = msgspec.UNSET


def in_columns(manifest: Manifest, crowds: list[Crowd]) -> Manifest:
    """A manifest with these besides."""
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return ManifestInColumns(**fields, crowds=crowds)


# Made before clients wait.
_DECODER = msgspec.msgpack.Decoder(Manifest)
_IN_COLUMNS = msgspec.msgpack.Decoder(ManifestInColumns)


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
    header = HEADER.pack(MAGIC, manifest.format, zlib.crc32(document), len(document))
    memfd = Fd(os.memfd_create("upgrader-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    for part in (header, document):
        view = memoryview(part)
        while view:
            view = view[os.write(memfd.fileno(), view) :]
    protect(memfd)
    return memfd


def checksum(memfd: Fd) -> int:
    """The checksum in the header of an image: the CRC-32 of its manifest. Raises ImageError."""
    header = os.pread(memfd.fileno(), HEADER.size, 0)
    if len(header) < HEADER.size:
        raise ImageError("image", f"truncated: {len(header)} of {HEADER.size} header bytes")
    return int(HEADER.unpack(header)[2])


def protect(memfd: Fd) -> None:
    """Seal a memfd: it never changes any more."""
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, SEALS)


def unseal(memfd: Fd) -> Manifest:
    """Read a manifest; raises ImageError that says what is wrong with it.

    It is mapped, not read: what is sealed can be decoded where it is, and for hundreds of megabytes
    a copy takes longer than all else.
    """
    with opened(memfd, "image", MAGIC, FORMATS) as (document, version, _):
        try:
            if version >= CROWDS:
                return _IN_COLUMNS.decode(document)
            manifest = _DECODER.decode(document)
            if Kind.SECRETS in {entry.kind for entry in manifest.entries}:
                return msgspec.msgpack.decode(document, type=ManifestOverTls)
            return manifest
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ImageError("image", f"manifest does not decode: {error}") from error


@contextmanager
def opened(
    memfd: Fd, item: str, magic: bytes, formats: Sequence[int]
) -> Iterator[tuple[memoryview, int, int]]:
    """The document of a sealed memfd that begins as an image does, its format and its checksum. Raises
    ImageError that says what is wrong with `item`."""
    number = memfd.fileno()
    try:
        seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        raise ImageError(item, "is not a memfd") from error
    if seals & SEALS != SEALS:
        raise ImageError(item, "is not sealed: it could change while it is read")
    header = os.pread(number, HEADER.size, 0)
    if len(header) < HEADER.size:
        raise ImageError(item, f"truncated: {len(header)} of {HEADER.size} header bytes")
    found, version, checksum, length = HEADER.unpack(header)
    if found != magic:
        raise ImageError(item, f"starts with {found!r}, not {magic!r}")
    if version not in formats:
        known = ", ".join(map(str, formats))
        raise ImageError(
            item,
            f"format {version} is unknown, this library reads formats {known}",
            remedy="start a version whose library can read it; the image is kept",
        )
    held = os.fstat(number).st_size - HEADER.size
    if length > MAX_BYTES or held != length:
        raise ImageError(item, f"truncated: {held} of {length} bytes (limit {MAX_BYTES})")
    with (
        mmap.mmap(number, 0, flags=_MAPPED, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as whole,
        whole[HEADER.size :] as document,
    ):
        if zlib.crc32(document) != checksum:
            raise ImageError(item, "checksum does not match")
        yield document, version, checksum
