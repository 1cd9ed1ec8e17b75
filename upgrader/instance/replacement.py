# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance that wants another one in its place: asks PID 1 for it, live if the unit allows it.

A restart follows if it does not, and if PID 1 takes no such wish of this user, the end of this process, where
`Restart=` starts the next one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from upgrader.errors import BusError
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.kinds import Standing
from upgrader.systemd.bus import Bus
from upgrader.systemd.live_limits import live_limits
from upgrader.systemd.unit import Unit

_BUS = 5.0
_AGAIN = 0.1  # seconds between two questions whether the reload is over
#: Restart= that follows an end without failure, and one with exit code 1.
_AFTER_SUCCESS, _AFTER_FAILURE = ("always", "on-success"), ("on-failure",)
_log = logging.getLogger("upgrader")


class Announced(Protocol):
    """What knows which upgrade the next reload is."""

    def announce(self) -> str:
        """The next reload is an upgrade, whether something has changed or not; returns its id."""

    def take_back(self, upgrade: str) -> None:
        """No reload comes for this id."""


class Replacement:
    """The wish of one instance; it serves on until the wish is granted."""

    def __init__(
        self,
        report: SelfReport,
        answering: Callable[[], Announced | None],
        end: Callable[[bool], object],
    ) -> None:
        """`answering` returns None if nobody can ask this instance. `end` has the process park and
        end, with a failure or without. Both are called in a thread."""
        self._report = report
        self._answering = answering
        self._end = end
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Begin, in a thread; nothing more if that goes on already."""
        thread = threading.Thread(target=self._work, name="upgrader-replacement", daemon=True)
        thread.start()

    def _work(self) -> None:
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._report.standing is Standing.SERVING and not self._live():
                self._restart()
        finally:
            self._lock.release()

    def _live(self) -> bool:
        """Ask for a reload; False if none was begun, so that a restart is the next best."""
        report, announced = self._report, self._answering()
        if announced is None or not report.parameters.enabled:
            return False
        wanted = announced.announce()
        try:
            if limits := live_limits(self._unit()):
                raise BusError(limits[0].cause)
            with Bus(_BUS) as bus:
                bus.begin_job("ReloadUnit", report.unit)
        except BusError as error:
            _log.info("no reload: %s", error)
            announced.take_back(wanted)
            return False
        while True:  # this process ends in it if all goes well
            time.sleep(_AGAIN)
            with contextlib.suppress(BusError):
                if self._unit().active_state not in ("reloading", "refreshing"):
                    break
        announced.take_back(wanted)
        # What takeover has registered is decided, and the journal says how; else it has refused.
        return report.progress.last.id == wanted

    def _unit(self) -> Unit:
        with Bus(_BUS) as bus:
            return Unit.from_properties("", bus.properties(self._report.unit))

    def _restart(self) -> None:
        report = self._report
        try:
            with Bus(_BUS) as bus:
                bus.begin_job("RestartUnit", report.unit)
                return
        except BusError as error:
            _log.info("no restart: %s", error)
        policy = ""
        with contextlib.suppress(BusError), Bus(_BUS) as bus:
            policy = bus.restart_policy(report.unit)
        if policy in (*_AFTER_SUCCESS, *_AFTER_FAILURE):
            self._end(policy in _AFTER_FAILURE)
        else:
            _log.error(
                "wants to be replaced, and serves on: systemd takes no wish of this user, and"
                " Restart=%s starts no other instance; set Restart=always", policy,
            )  # fmt: skip
