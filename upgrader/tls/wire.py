# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records and messages of TLS 1.3, as RFC 8446 has them on the wire; does no cryptography."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER = 5  # bytes of the header of a record
#: Most bytes of data in a record, RFC 8446, section 5.1.
MAX_DATA = 1 << 14
#: Most bytes of a record without its header, section 5.2.
MAX_RECORD = MAX_DATA + 256
#: The same in TLS 1.2, which a client may speak until the versions are negotiated: RFC 5246, 6.2.3.
MAX_OLD_RECORD = MAX_DATA + 2048
_VERSION = b"\x03\x03"
_MAX_HELLO = 1 << 17  # bytes; OpenSSL takes 131,396
_MAX_FRAGMENT_LENGTH, _RECORD_SIZE_LIMIT = 1, 28  # extensions: RFC 6066, RFC 8449


class Content(IntEnum):
    """What is in a record: section B.1."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    DATA = 23


KINDS = frozenset(map(int, Content))


class Alert(IntEnum):
    """Why a connection ends: section B.2."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    USER_CANCELED = 90


CLIENT_HELLO, KEY_UPDATE = 1, 24  # types of handshake messages: section B.3
#: A KeyUpdate that asks for none in return, and one that does: section 4.6.3.
UPDATE, UPDATE_REQUESTED = b"\x18\0\0\x01\0", b"\x18\0\0\x01\x01"


def header(content: int, length: int) -> bytes:
    """The header of a record whose rest has so many bytes."""
    return struct.pack("!B2sH", content, _VERSION, length)


def length_of(buffer: bytes | bytearray) -> int:
    """The bytes of the first record, with its header; 0 if its header is not all there."""
    return HEADER + int.from_bytes(buffer[3:HEADER], "big") if len(buffer) >= HEADER else 0


def whole(buffer: bytes | bytearray) -> int:
    """All bytes of a buffer, if its first record is all there; else 0."""
    length = length_of(buffer)
    return len(buffer) if length and len(buffer) >= length else 0


def take(buffer: bytearray) -> bytes:
    """Take the first record out of a buffer; empty if it is not all there."""
    if not whole(buffer):
        return b""
    length = length_of(buffer)
    record = bytes(buffer[:length])
    del buffer[:length]
    return record


@dataclass(frozen=True, slots=True)
class ClientHello:
    """`random`: 32 bytes, chosen by the client; `limit`: most bytes of data in a record that it is
    sent, as it has asked for."""

    random: bytes
    limit: int = MAX_DATA

    @classmethod
    def find(cls, messages: bytes | bytearray) -> ClientHello | None:
        """Read the first handshake message of a client; None if it is not all there. Raises
        ValueError for anything else."""
        if len(messages) < 4:
            return None
        length = int.from_bytes(messages[1:4], "big")
        if messages[0] != CLIENT_HELLO or length > _MAX_HELLO:
            raise ValueError("it does not begin with a ClientHello")
        if len(messages) < 4 + length:
            return None
        rest = _Bytes(bytes(messages[4 : 4 + length]))
        rest.take(2)
        random = rest.take(32)
        rest.vector(1)  # session id
        rest.vector(2)  # cipher suites
        rest.vector(1)  # compression methods
        extensions = _Bytes(rest.vector(2) if rest.left else b"")
        limit = MAX_DATA
        while extensions.left:
            kind = int.from_bytes(extensions.take(2), "big")
            body = extensions.vector(2)
            if kind == _MAX_FRAGMENT_LENGTH:
                if len(body) != 1 or not 1 <= body[0] <= 4:
                    raise ValueError("its max_fragment_length is none")
                limit = min(limit, 256 << body[0])
            elif kind == _RECORD_SIZE_LIMIT:  # with the type of the content
                limit = min(limit, int.from_bytes(body, "big") - 1)
        if limit < 1:
            raise ValueError("its record_size_limit is none")
        return cls(random, limit)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError("its ClientHello is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def vector(self, size: int) -> bytes:
        """A length of so many bytes, and so much."""
        return self.take(int.from_bytes(self.take(size), "big"))
