# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signals that mean something to an instance on an asyncio loop: stops and reloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

from upgrader.instance.fork_guard import catches
from upgrader.instance.parts import InstanceParts
from upgrader.instance.process import reload_signals, stop_signals, unhandled
from upgrader.protocol.kinds import Standing
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.instance import unit_signals
else:
    unit_signals = later("upgrader.instance.unit_signals")

_log = logging.getLogger("upgrader")


class AsyncioSignals:
    """Handles them from `listen` to `restore`, as callbacks of the running loop."""

    def __init__(
        self, parts: InstanceParts, stop: asyncio.Event, reload: Callable[[], object]
    ) -> None:
        """`stop` is set by a stop. `reload` runs what the author wants at a reload, and waits for it; it
        is called in a thread."""
        self._parts = parts
        self._stop = stop
        self._reload = reload
        self._loop = asyncio.get_running_loop()
        self._stops: set[int] = set()
        self._waits = False  # PID 1 waits for the end of a reload that a signal has begun
        self._by_signal: unit_signals.ReloadBySignal | None = None
        supervised = parts.report.supervised
        self._first = stop_signals(supervised), reload_signals(supervised)
        catches(self._first[0] | self._first[1])

    def listen(self) -> None:
        """Handle them from now on."""
        self._catch(*self._first)

    def restore(self) -> None:
        """Handle stops no more."""
        for number in self._stops:
            self._loop.remove_signal_handler(number)

    def heed_later(self, found: unit_signals.UnitSignals) -> None:
        """In another thread: have the loop handle what the unit names as well."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._heed, found)

    def _heed(self, found: unit_signals.UnitSignals) -> None:
        if self._parts.report.standing in (Standing.SERVING, Standing.MIGRATING):
            catches(found.stops | found.reloads)
            self._waits = found.waits
            self._catch(found.stops - self._stops, unhandled(*found.reloads))

    def _catch(self, stops: Set[int], reloads: Set[int]) -> None:
        for number in stops:
            self._stops.add(number)
            self._end_at(number)
        for number in reloads:
            self._loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        """A signal has asked for a reload."""
        self._by_signal = self._by_signal or unit_signals.ReloadBySignal(
            self._parts.report, self._reload
        )
        self._by_signal.came(waits=self._waits)

    def _end_at(self, number: int) -> None:
        """End at a signal; a handler that somebody else had for SIGTERM runs then, too."""
        theirs = signal.getsignal(number) if number == signal.SIGTERM else None

        def stopped() -> None:
            self._stop.set()
            if callable(theirs):
                try:
                    theirs(number, None)
                except BaseException:  # SystemExit is what many of them raise
                    _log.info("what a handler of SIGTERM raises ends nothing here", exc_info=True)

        self._loop.add_signal_handler(number, stopped)
