# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves with connections and may be in no image, such as the cookies of an opening handshake.

It has an FD of its own: a memfd that is not sealed, so that whoever has become the owner empties it.
An image is kept aside, shown and insured; none of that may hold such a secret.
"""

import os
from collections.abc import Mapping

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol.fd import Fd

#: Largest file, in bytes: a bound on what a damaged one can make us allocate.
MAX_BYTES = 1 << 28
MAGIC = b"UPGSECR"
_BEGIN = MAGIC + b"\1"  # with the version of the format
_ITEM = "secrets of connections"


def write(secrets: Mapping[int, bytes]) -> Fd:
    """Put the secrets of connections, by the inodes of their sockets, into a new memfd.

    Raises ImageError if they are too many, OSError when out of memory or FDs.
    """
    document = _BEGIN + msgspec.msgpack.encode(secrets)
    if len(document) > MAX_BYTES:
        raise ImageError(_ITEM, f"of {len(document)} bytes are too large (limit {MAX_BYTES})")
    memfd = Fd(os.memfd_create("upgrader-secrets", os.MFD_CLOEXEC))
    view = memoryview(document)
    while view:
        view = view[os.write(memfd.fileno(), view) :]
    return memfd


def read(memfd: Fd) -> dict[int, bytes]:
    """The secrets by inode, empty once they are wiped; raises ImageError for anything else.

    Only `pread` is used: the file offset belongs to every process that holds the memfd.
    """
    try:
        size = os.fstat(memfd.fileno()).st_size
        document = os.pread(memfd.fileno(), min(size, MAX_BYTES + 1), 0)
    except OSError as error:
        raise ImageError(_ITEM, f"cannot be read: {error.strerror}") from error
    if not document:
        return {}
    if len(document) > MAX_BYTES or not document.startswith(_BEGIN):
        raise ImageError(_ITEM, "are none, or of a version that is not known")
    try:
        return msgspec.msgpack.decode(document[len(_BEGIN) :], type=dict[int, bytes])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ImageError(_ITEM, "do not decode") from error


def wipe(memfd: Fd) -> None:
    """Empty it, for every process that holds it; the kernel clears its pages before it uses them anew."""
    os.ftruncate(memfd.fileno(), 0)
