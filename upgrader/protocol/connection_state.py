# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves with a connection besides its FD; reads and writes nothing."""

from enum import StrEnum

import msgspec


class Waiting(StrEnum):
    """Where the handler of a connection stood when it was frozen; on the wire."""

    MESSAGE = "message"  #: for the next message, with nothing in hand
    SAFE = "safe"  #: inside `peer.safe()`: the state says where it stands
    CLOSING = "closing"  #: the handler is done, unsent bytes are left


class ConnectionState(msgspec.Struct, frozen=True, array_like=True):
    """Bytes received and not handled, bytes written and not sent, and the author's own state."""

    waiting: Waiting
    unread: bytes = b""
    unsent: bytes = b""
    session: bytes = b""
