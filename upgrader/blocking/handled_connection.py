# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection whose handler is called by the loop without asyncio, and what moves of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upgrader.errors import Retired
from upgrader.instance.connection import ConnectionStream
from upgrader.instance.declarations import Connections
from upgrader.instance.handled import Handled
from upgrader.instance.inbox import Frame
from upgrader.protocol.kinds import Waiting

if TYPE_CHECKING:
    from upgrader.blocking.all_connections import ServedConnections


class BlockingConnection(Handled):
    """A connection between its handler and its socket."""

    def __init__(
        self, served: ServedConnections, declared: Connections, stream: ConnectionStream, session: Any,
        *, adopted: bool,
    ) -> None:  # fmt: skip
        """`session`: the state that goes with it."""
        super().__init__(declared.listener.name, stream, session, adopted=adopted)
        self.declared = declared
        self._all = served

    def message(self, frame: Frame, limit: int) -> bytes | None:
        """The next whole message that is here; None while other adopted connections have not been
        given to their handlers yet."""
        if self._all.beginning:
            return None
        return self.stream.inbox.take_message(frame, limit)

    def queue(self, data: bytes) -> None:
        """Queue data; raises ConnectionResetError when the peer is gone, Retired after a migration."""
        if self._all.frozen:
            raise Retired(self.address)
        self.stream.queue(data)
        if self.stream.unsent:
            self._all.watch(self)  # it may not be the one whose handler runs

    def close(self) -> None:
        """Close the connection once this call of the handler is over and all is sent."""
        self.stream.waiting = Waiting.CLOSING
