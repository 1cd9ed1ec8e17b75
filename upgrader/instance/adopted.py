# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection that has moved here, before anything is done for it."""

import socket
from typing import Any, ClassVar

import msgspec

from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity
from upgrader.protocol.kinds import Waiting


class Adopted(msgspec.Struct, eq=False):
    """One connection that has moved here, with what moved along. Owns its FD until `take`.

    `since`: of `time.monotonic`, for people; `tls`: the TLS of it (a `tls.moved.Moved`), if it has any.
    `as_it_came`: as long as nobody has had `session` in hand, to save that would make the bytes of
    `state` again. `secret`: what was in no image.

    A struct, because there may be thousands and clients wait: it is made in a third of the time.
    """

    what: ClassVar[str] = ""  # only its handler knows

    listener: str
    fd: Fd
    identity: Identity
    state: ConnectionState
    session: Any
    since: float = 0.0
    tls: Any = None
    as_it_came: bool = False
    secret: bytes = b""

    @property
    def waiting(self) -> Waiting | None:
        """Its safe point."""
        return self.state.waiting

    def fileno(self) -> int:
        """The number of its FD, -1 once it is taken."""
        return self.fd.fileno()

    def take(self) -> socket.socket:
        """Its socket, which the caller owns: after the commit, as before it nothing may touch it."""
        return self.fd.socket()

    def close(self) -> None:
        """Close it, unless it is taken."""
        self.fd.close()
