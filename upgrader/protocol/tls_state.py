# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves with a TLS connection besides its FD: in the image all that is no secret, and its
secrets apart."""

from typing import Any

import msgspec


class TlsState(msgspec.Struct, frozen=True, array_like=True):
    """A TLS 1.3 connection of a server, between two of its records.

    `suite`: the name of its cipher suite; `received`, `sent`: records that were opened and sealed
    under the key of the client and of the server as it is now; `ciphertext`: bytes that came and were
    not opened; `owes_update`: the client has asked for a KeyUpdate and has had none; `limit`: most
    bytes of data in a record to the client. The rest answers what a program may ask: `certificate` is
    the client's in DER, `certificate_fields` the same as `getpeercert()` has it.
    """

    suite: str
    received: int
    sent: int
    ciphertext: bytes = b""
    owes_update: bool = False
    limit: int = 1 << 14
    alpn: str | None = None
    resumed: bool = False
    certificate: bytes | None = None
    certificate_fields: dict[str, Any] | None = None
    channel_binding: bytes | None = None


class TlsSecrets(msgspec.Struct, frozen=True, array_like=True):
    """The traffic secrets of both directions, as they are now: RFC 8446, section 7."""

    client: bytes
    server: bytes

    def __repr__(self) -> str:
        return "TlsSecrets(...)"  # they belong into no log
