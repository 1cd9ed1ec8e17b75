# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accept connections of one listener on an asyncio loop, while it is open."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from upgrader.instance.connection import accept
from upgrader.instance.declared_socket import Bound

_ACCEPTS = 128  # connections accepted in one go, so that one listener does not starve the others
_PATIENCE = 1.0  # seconds until accepting is tried again after an error
_log = logging.getLogger("upgrader")


class Acceptor:
    """Accepts connections of a listener while it is open."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: Bound,
        on_connection: Callable[[socket.socket], object],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._on_connection = on_connection
        self._is_open = False
        self._again: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Accept, beginning with who waited on a listener that this one replaces."""
        self._is_open = True
        while self._listener.backlog:
            self._on_connection(self._listener.backlog.popleft())
        for sock in self._listener.sockets:
            self._loop.add_reader(sock, self._on_acceptable, sock)

    def close(self) -> None:
        """Accept no more; the listener stays, and the kernel queues whoever connects."""
        self._is_open = False
        if self._again:
            self._again.cancel()
            self._again = None
        for sock in self._listener.sockets:
            self._loop.remove_reader(sock)

    def _on_acceptable(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if not self._is_open:
                return
            try:
                sock = accept(listening)
            except OSError as error:  # out of FDs or memory: leave them in the backlog for a while
                _log.error("%s: cannot accept: %s", self._listener.name, error)
                self.close()
                self._again = self._loop.call_later(_PATIENCE, self.open)
                return
            if sock is None:
                return
            self._on_connection(sock)
