# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of the migration stream: values to bytes and back; does no IO.

Every record is RECORD_SIZE bytes, so that one `recvmsg` reads exactly one record with its FDs:
a read that ends inside a record would deliver the FDs twice when peeking. Only the last record
comes without FDs: peeking at any other such record would deliver those of the next one with it.
"""

import struct
from enum import StrEnum

import msgspec

from upgrader.codes import Code
from upgrader.errors import ForeignError, ProtocolError

MAGIC = b"UPGR"
#: Versions of the stream that are read. 2: an Ack names what it acknowledges, an Abort has a code. 3:
#: pieces of tables come before the image.
VERSIONS = (1, 2, 3)
#: The version from which on pieces of tables come.
TABLES = 3
#: What is parked needs nothing newer, and an older library can still load it.
PARKED = 1
#: 192 bytes of data and its bookkeeping fill one kernel buffer of 768 bytes: 278 records fit a
#: default socket buffer (net.core.wmem_default), against 167 at 256 bytes.
RECORD_SIZE = 192
#: Most FDs in one message: SCM_MAX_FD of the kernel.
MAX_FDS = 253
#: FDs of a Hello: the image and the ledger of load attempts.
HELLO_FDS = 2

#: Longest reason of an Abort, in bytes: what a record has room for beside the longest Code.
REASON_SIZE = 130

_HEADER = struct.Struct("!4sHH")  # magic, version, length of the msgpack body in bytes


class EndReason(StrEnum):
    """Why the list of FDs ended."""

    COMPLETE = "complete"
    TOO_MANY_IN_FLIGHT = "too-many-in-flight"  #: ETOOMANYREFS: RLIMIT_NOFILE of the user
    CHANNEL_FULL = "channel-full"  #: the socket buffer takes no more


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First record, with the image and the ledger: whose image this is, and how many FDs follow."""

    generation: int
    fds: int


class Fds(msgspec.Struct, frozen=True, tag="fds"):
    """A batch of FDs for the manifest entries `first` to `first + count - 1`."""

    first: int
    count: int


class End(msgspec.Struct, frozen=True, tag="end"):
    """Last record: how many FDs were sent, and why not more."""

    sent: int
    reason: EndReason


class Go(msgspec.Struct, frozen=True, tag="go"):
    """The destination is prepared and waits for the image; from here on it is a pause."""


class TablePiece(msgspec.Struct, frozen=True, tag="table-piece"):
    """A piece of a table, in a sealed memfd; `number` counts them from 0 on. The source serves on."""

    number: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The destination has loaded so many of the manifest's entries; before the image comes, so many
    pieces of tables."""

    loaded: int


class Ack(msgspec.Struct, frozen=True, tag="ack", omit_defaults=True):
    """The destination has loaded and checked an image: the commit, if it is the one that was sent.

    `generation` is that of Hello, `image` the checksum in the header of the image. In version 1 an
    Ack names nothing: both are 0.
    """

    generation: int = 0
    image: int = 0


class Abort(msgspec.Struct, frozen=True, tag="abort", omit_defaults=True):
    """The destination gives up; `reason` is for people, at most REASON_SIZE bytes.

    `code` is the value of a Code; "" in version 1, and a later version may have others.
    """

    reason: str
    code: str = ""


Record = Hello | Fds | End | Go | TablePiece | Progress | Ack | Abort
_DECODER = msgspec.msgpack.Decoder(Record)  # made before clients wait


def encode(record: Record, version: int) -> bytes:
    """A record as exactly RECORD_SIZE bytes of a stream of this version.

    A reader of version 1 takes the records of version 2, and knows nothing of their new fields.
    """
    body = msgspec.msgpack.encode(record)
    frame = _HEADER.pack(MAGIC, version, len(body)) + body
    if len(frame) > RECORD_SIZE:
        raise ProtocolError(type(record).__name__, f"{len(frame)} bytes exceed {RECORD_SIZE}")
    return frame.ljust(RECORD_SIZE, b"\0")


def abort(code: Code, reason: str) -> Abort:
    """An Abort with as much of a reason as fits a record."""
    return Abort(reason.encode()[:REASON_SIZE].decode(errors="ignore"), code.value)


def decode(frame: bytes) -> Record:
    """The record in a frame; raises ProtocolError that names what is wrong, ForeignError if it does
    not begin as a record does."""
    if not MAGIC.startswith(frame[: len(MAGIC)]):
        raise ForeignError("record", f"starts with {frame[: len(MAGIC)]!r}, not {MAGIC!r}")
    if len(frame) != RECORD_SIZE:
        raise ProtocolError("record", f"{len(frame)} bytes instead of {RECORD_SIZE}")
    _, version, length = _HEADER.unpack_from(frame)
    if version not in VERSIONS:
        raise ProtocolError("stream", f"version {version}, this library speaks {VERSIONS}")
    if length > RECORD_SIZE - _HEADER.size:
        raise ProtocolError("record", f"claims {length} bytes of body")
    body = frame[_HEADER.size : _HEADER.size + length]
    try:
        record: Record = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise ProtocolError("record", f"does not decode: {error}") from error
    return record
