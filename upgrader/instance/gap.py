# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many datagrams the kernel has dropped since the freeze, until somebody has caught up."""

from __future__ import annotations

import logging
import threading

from upgrader.backends import datagrams
from upgrader.protocol.kinds import Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from upgrader.instance.declarations import Declarations

#: Seconds after the commit from which on drops are not the upgrade's, if nobody is seen to receive.
_LONGEST = 2.0
_log = logging.getLogger("upgrader")


class Gap:
    """The gap of one upgrade. A full receive buffer takes nothing before something is taken from it, so
    the gap ends when there is room again, and not with the commit."""

    def __init__(self, declarations: Declarations, before: Mapping[int, int]) -> None:
        """`before`: how many were dropped at the freeze, by the inode of the socket."""
        self._declarations = declarations
        self._before = before
        self._counted: int | None = None
        self._told = 0
        self._lock = threading.Lock()

    @property
    def lost(self) -> int:
        """How many so far, or in all."""
        if self._counted is not None:
            return self._counted
        if not self._before:
            return 0
        now = self._declarations.datagrams_dropped()
        return sum((now[n] - was) % (1 << 32) for n, was in self._before.items() if n in now)

    def begin_to_receive(self) -> int:
        """From here on this instance owns the sockets; returns what is to be told with that."""
        self._told = self.lost
        if self._before:
            for bound in self._declarations.sockets.values():
                bound.before_receiving = self._look
            timer = threading.Timer(_LONGEST, self.end)
            timer.daemon = True
            timer.start()
        return self._told

    def _look(self) -> None:
        if not any(
            datagrams.crowded(sock)
            for bound in self._declarations.sockets.values()
            if bound.kind is Kind.DATAGRAMS
            for sock in bound.sockets
        ):
            self.end()

    def end(self) -> None:
        """What is dropped from here on is none of the upgrade's; called from any thread."""
        with self._lock:
            if self._counted is not None:
                return
            self._counted = self.lost
        for bound in self._declarations.sockets.values():
            bound.before_receiving = None
        if self._counted > self._told:
            _log.warning("%d datagrams were lost in the pause in all", self._counted)
