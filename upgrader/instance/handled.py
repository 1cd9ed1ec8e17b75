# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection with a handler, whatever calls that, as others see it."""

from __future__ import annotations

from upgrader.instance.connection import ConnectionStream, show_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Handled:
    """One connection of a listener, with the state that goes with it (`session`).

    `adopted`: the instance before has had it.
    """

    def __init__(
        self, listener: str, stream: ConnectionStream, session: Any, *, adopted: bool
    ) -> None:
        self.listener = listener
        self.stream = stream
        self.session = session
        self.adopted = adopted

    @property
    def address(self) -> str:
        """The other end's address, as people write it."""
        return show_peer(self.stream.sock)

    @property
    def unsent(self) -> int:
        """Bytes written and not sent."""
        return len(self.stream.unsent)
