# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say which signals PID 1 may send to an instance by the settings of its unit, and what a reload by signal
is."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable

from upgrader.errors import BusError, UpgradeError
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.kinds import Standing
from upgrader.protocol.values import Value
from upgrader.systemd.bus import Bus
from upgrader.systemd.unit import NOTIFY_RELOAD, Unit

_log = logging.getLogger("upgrader")
_BUS = 2.0  # seconds for PID 1 to answer
_CATCHABLE: frozenset[int] = frozenset(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}


class UnitSignals(Value):
    """Numbers of signals that stop the instances of a unit, and that ask them to reload.

    `waits`: PID 1 waits until a reload is reported (Type=notify-reload).
    """

    stops: frozenset[int]
    reloads: frozenset[int] = frozenset()
    waits: bool = False


def ask_signals(unit: str) -> UnitSignals:
    """KillSignal=, RestartKillSignal= and ReloadSignal= of a unit; none if PID 1 does not say."""
    reloads: set[int] = set()
    waits = False
    try:
        with Bus(_BUS) as bus:
            stops = {bus.number(unit, name) for name in ("KillSignal", "RestartKillSignal")}
            if bus.text(unit, "Type") == NOTIFY_RELOAD:
                waits = True
                reloads.add(bus.number(unit, "ReloadSignal"))
    except BusError:
        stops = set()
    return UnitSignals(_CATCHABLE & stops, (_CATCHABLE & reloads) - stops, waits)


class ReloadBySignal:
    """What an instance does at SIGHUP, or ReloadSignal=: what the author declared for a reload.

    If takeover runs in the same reload (a unit may have a line with `kill -HUP` before it), that is
    left to it.
    """

    def __init__(self, report: SelfReport, on_reload: Callable[[], object]) -> None:
        """`on_reload` runs what was declared, and waits for it; called in a thread."""
        self._report = report
        self._on_reload = on_reload
        self._lock = threading.Lock()
        self._due = False
        self._waits = False

    def came(self, *, waits: bool) -> None:
        """Reload, in a thread; called by the loop, not in a signal handler.

        `waits`: PID 1 waits for the end of it, as far as is known.
        """
        self._waits = waits
        if not self._due:
            self._due = True
            threading.Thread(target=self._work, name="upgrader-reload", daemon=True).start()

    def _work(self) -> None:
        with self._lock:
            self._due = False
            if self._report.standing is Standing.SERVING:
                self._reload()

    def _reload(self) -> None:
        report = self._report
        waits = self._waits
        try:
            with Bus(_BUS) as bus:
                unit = Unit.from_properties("", bus.properties(report.unit))
            if unit.active_state == "reloading" and any(
                line.runs_takeover for line in unit.exec_reload
            ):
                return
            waits = unit.type == NOTIFY_RELOAD
        except BusError:
            pass  # as far as is known
        try:
            if waits:
                began = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
                report.notifier.send("RELOADING=1", f"MONOTONIC_USEC={began}")
            try:
                self._on_reload()
            except Exception:
                _log.exception("the reload has failed")
            if waits:  # PID 1 knows no other end of it
                report.notifier.send("READY=1")
        except UpgradeError as error:
            _log.error("systemd was not told of the reload: %s", error)
