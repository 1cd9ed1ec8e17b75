# SPDX-License-Identifier: LGPL-2.1-or-later
"""One direction of a TLS 1.3 connection: seals or opens its records, one after the other.

The nonce of a record is its number, so the same number must never be sealed twice under one key: a
direction has one user, in one process. RFC 8446, sections 5 and 7.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from upgrader.tls.wire import HEADER, Alert, Content, header

_TAG = 16  # bytes that each of these AEADs adds
_IV = 12


class Refused(Exception):
    """A record that must end its connection, with this alert."""

    def __init__(self, alert: Alert, why: str) -> None:
        super().__init__(why)
        self.alert = alert


class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher suite: `digest` is its hash's name, `key` the bytes of a key."""

    digest: str
    key: int
    aead: Callable[[bytes], _Aead]
    secret: int  # bytes of a secret: as many as the hash has


SUITES = {
    "TLS_AES_128_GCM_SHA256": Suite("sha256", 16, AESGCM, 32),
    "TLS_AES_256_GCM_SHA384": Suite("sha384", 32, AESGCM, 48),
    "TLS_CHACHA20_POLY1305_SHA256": Suite("sha256", 32, ChaCha20Poly1305, 32),
}


def expand_label(digest: str, secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label with an empty context: section 7.1."""
    label = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    made, block, number = b"", b"", 1
    while len(made) < length:
        block = hmac.digest(secret, block + info + bytes([number]), digest)
        made += block
        number += 1
    return made[:length]


class Direction:
    """The records that one side sends: `count` of them were sealed or opened under this key."""

    __slots__ = ("_aead", "_iv", "_suite", "count", "secret")

    def __init__(self, suite: Suite, secret: bytes, count: int = 0) -> None:
        """Raises ValueError for a secret or a count that cannot be."""
        if len(secret) != suite.secret or not 0 <= count < 1 << 62:
            raise ValueError("no traffic secret of this cipher suite")
        self._suite = suite
        self._begin(secret, count)

    def _begin(self, secret: bytes, count: int) -> None:
        self.secret = secret
        self.count = count
        self._aead: _Aead | None = None  # made when it is used: thousands may arrive in a pause
        self._iv = 0

    def _derive(self) -> _Aead:
        suite, secret = self._suite, self.secret
        self._iv = int.from_bytes(expand_label(suite.digest, secret, b"iv", _IV), "big")
        self._aead = suite.aead(expand_label(suite.digest, secret, b"key", suite.key))
        return self._aead

    def update(self) -> None:
        """Go on with the next key, as after a KeyUpdate: section 7.2."""
        suite = self._suite
        self._begin(expand_label(suite.digest, self.secret, b"traffic upd", suite.secret), 0)

    def seal(self, content: int, data: bytes) -> bytes:
        """The next record, with its header."""
        head = header(Content.DATA, len(data) + 1 + _TAG)
        aead = self._aead or self._derive()
        return head + aead.encrypt(self._nonce(), data + bytes((content,)), head)

    def open(self, record: bytes) -> tuple[int, bytes]:
        """What is in the next record, and its kind; raises Refused."""
        if len(record) < HEADER + _TAG + 1:
            raise Refused(Alert.BAD_RECORD_MAC, "a record without room for its tag")
        aead = self._aead or self._derive()
        try:
            inner = aead.decrypt(self._nonce(), record[HEADER:], record[:HEADER])
        except InvalidTag:
            raise Refused(Alert.BAD_RECORD_MAC, "a record that the key does not open") from None
        inner = inner.rstrip(b"\0")
        if not inner:
            raise Refused(Alert.UNEXPECTED_MESSAGE, "a record of padding only")
        return inner[-1], inner[:-1]

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self.count).to_bytes(_IV, "big")
        self.count += 1
        return nonce

    def __repr__(self) -> str:
        return f"Direction(count={self.count})"
