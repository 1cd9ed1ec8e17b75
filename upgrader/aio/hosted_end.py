# SPDX-License-Identifier: LGPL-2.1-or-later
"""End the connections of libraries by a deadline: each after what it is at, those without an end by a goodbye,
and what is left is cut."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upgrader.aio.hosted_connection import HostedConnection
    from upgrader.aio.hosted_listener import HostedListener

_LOOK = 0.02  # seconds; libraries do not say when a connection has ended
_NAMED = 20  # connections that are named in the log before only their number is
_log = logging.getLogger("upgrader")


class Goodbyes:
    """Closes connections without an end, one after the other: clients that are all closed at once
    all dial again at once."""

    def __init__(self, begin: float, spread: float) -> None:
        """`begin`: of `time.monotonic`; `spread`: seconds from the first one to the last."""
        self._begin = begin
        self._spread = spread
        self._all = 0  # that were there at the beginning

    def say(self, connections: Sequence[HostedConnection]) -> None:
        """Close as many of these as are due, the oldest first."""
        passed = time.monotonic() - self._begin
        if passed < 0:
            return
        self._all = self._all or len(connections)
        may_stay = int(self._all * (1 - passed / self._spread)) if passed < self._spread else 0
        for hosted in connections[: len(connections) - may_stay]:
            hosted.close()


async def end_all(
    hostings: Collection[HostedListener],
    deadline: float,
    stop: asyncio.Event | None = None,
    goodbyes: Goodbyes | None = None,
) -> None:
    """Wait until all connections have ended; cut and name them at the deadline, or at `stop`."""
    while time.monotonic() < deadline and not (stop and stop.is_set()):
        left = [hosting.drain() for hosting in hostings]
        if not any(left):
            return
        if goodbyes:
            goodbyes.say([each for hosting in hostings for each in hosting.to_be_told])
        await asyncio.sleep(_LOOK)
    cut = [what for hosting in hostings for what in await hosting.cut()]
    for what in cut[:_NAMED]:
        _log.warning("cut: %s", what)
    if cut:
        _log.warning("%d connections were cut, their time was up", len(cut))
