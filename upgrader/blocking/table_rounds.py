# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has the tables of a source copied between two turns of a blocking loop."""

from __future__ import annotations

import selectors
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

    from upgrader.instance.copying import Copying
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.interfaces import Loop
    from upgrader.instance.live_source import MigrationRequest
    from upgrader.instance.source_side import SourceSide


class TableRounds:
    """The copying before a freeze, if there is any; what comes on its channel wakes the loop."""

    def __init__(self, source: SourceSide, selector: selectors.BaseSelector) -> None:
        self._source = source
        self._selector = selector
        self._channel: socket | None = None
        self._copying: Copying | None = None
        self._until = 0.0

    @property
    def due(self) -> list[float]:
        """When there is something to do, of `time.monotonic`; nothing if nothing is copied."""
        return [self._until] if self._copying else []

    def begin(self, request: MigrationRequest | Execution, loop: Loop) -> None:
        """Begin, if that is a request of a destination that takes tables in rounds."""
        from upgrader.instance.live_source import MigrationRequest  # loaded since it answers

        if not isinstance(request, MigrationRequest):  # the process becomes the new version
            return
        self._copying = self._source.copy(request, loop)
        if self._copying:
            self._until = time.monotonic()
            self._channel = request.sock
            self._selector.register(request.sock, selectors.EVENT_READ, self)

    def over(self) -> bool:
        """Copy some more; returns whether nothing is left to do."""
        wait = self._copying.step() if self._copying else None
        self._until = time.monotonic() + (wait or 0.0)
        return wait is None

    def end(self) -> bool:
        """The loop hears no more of it; returns whether the freeze may come. If not, this instance
        serves on, and has said why."""
        copying, self._copying = self._copying, None
        if self._channel:
            self._selector.unregister(self._channel)
        self._channel = None
        return copying is None or self._source.copied(copying)
