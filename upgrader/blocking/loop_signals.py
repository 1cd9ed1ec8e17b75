# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signals that mean something to an instance without asyncio: stops and reloads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Set
from types import FrameType
from typing import TYPE_CHECKING, Any

from upgrader.instance.fork_guard import catches
from upgrader.instance.parts import InstanceParts
from upgrader.instance.process import reload_signals, stop_signals, unhandled
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.instance import unit_signals
else:
    unit_signals = later("upgrader.instance.unit_signals")


class LoopSignals:
    """Handles them from `listen` to `restore`, in the main thread; each wakes the loop, which calls
    `heed`."""

    def __init__(
        self,
        parts: InstanceParts,
        stopped: threading.Event,
        wake_up: Callable[[], object],
        reload: Callable[[], object],
    ) -> None:
        """`stopped` is set by a stop, once this instance owns anything. `reload` runs what the author
        wants at a reload, and waits for it; it is called in a thread."""
        self._parts = parts
        self._stopped = stopped
        self._wake_up = wake_up
        self._reload = reload
        self._signalled = False  # a signal has asked for a reload
        self._by_signal: unit_signals.ReloadBySignal | None = None
        self._found: unit_signals.UnitSignals | None = None  # what PID 1 has said by now
        self._waits = False  # PID 1 waits for the end of a reload that a signal has begun
        self._before: dict[int, Any] = {}  # handlers that were there before ours

    def listen(self, waker: int) -> None:
        """Handle them from now on; an FD is written to for each."""
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        supervised = self._parts.report.supervised
        self._catch(stop_signals(supervised), reload_signals(supervised))

    def restore(self) -> None:
        """Give them back to who handled them before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, stops: Set[int], reloads: Set[int]) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            if not self._parts.destination.committing:
                raise SystemExit(128 + number)  # not the owner yet: nothing to park, somebody waits
            self._stopped.set()

        def reload(number: int, frame: FrameType | None) -> None:
            self._signalled = True

        catches(stops | reloads)
        for number in reloads:
            signal.signal(number, reload)
        for number in stops:
            self._before[number] = signal.signal(number, stop)

    def heed_later(self, found: unit_signals.UnitSignals) -> None:
        """In another thread: have the loop handle what the unit names as well."""
        self._found = found
        self._wake_up()

    def heed(self) -> None:
        """Do what other threads and signals have left to the loop."""
        if found := self._found:
            self._found, self._waits = None, found.waits
            self._catch(found.stops - self._before.keys(), unhandled(*found.reloads))
        if self._signalled:
            self._signalled = False
            self._by_signal = self._by_signal or unit_signals.ReloadBySignal(
                self._parts.report, self._reload
            )
            self._by_signal.came(waits=self._waits)
