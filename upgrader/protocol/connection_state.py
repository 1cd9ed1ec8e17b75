# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves with a connection besides its FD."""

import msgspec

from upgrader.protocol.kinds import Waiting


class ConnectionState(msgspec.Struct, frozen=True, array_like=True):
    """Bytes received and not handled, bytes written and not sent, and the author's own state."""

    waiting: Waiting
    unread: bytes = b""
    unsent: bytes = b""
    session: bytes = b""
