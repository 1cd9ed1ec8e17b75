# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say why PID 1 stops this unit: tell `stop`, `restart` and soft-reboot apart."""

from __future__ import annotations

import contextlib
from enum import StrEnum

from upgrader.errors import BusError
from upgrader.protocol.values import Value
from upgrader.systemd.bus import Bus, QueuedJob

#: Longest wait for PID 1's answer, in seconds; it adds to the pause of every restart.
TIMEOUT = 0.2
#: DefaultTimeoutStopSec= of systemd, in seconds.
DEFAULT_STOP_TIMEOUT = 90.0


class StopReason(StrEnum):
    """What SIGTERM means this time."""

    STOP = "stop"  #: an admin wants it gone: drain, leave nothing in the FD store
    RESTART = "restart"  #: another instance follows: park
    SOFT_REBOOT = "soft-reboot"  #: its job says "stop", but the FD store survives: park
    NO_JOB = "no-job"  #: a signal sent by hand, say, and Restart= may follow: park
    UNKNOWN = "unknown"  #: no answer: parking loses nothing, draining might


class StopJob(Value):
    """Why this unit is stopped, and after how many seconds PID 1 sends SIGKILL."""

    reason: StopReason
    timeout: float


def ask(unit: str, *, failed: bool = False) -> StopJob:
    """Ask PID 1 which job stops `unit`; never fails and never takes longer than TIMEOUT.

    `failed`: this process ends with a failure of its own.
    """
    reason, timeout = StopReason.UNKNOWN, DEFAULT_STOP_TIMEOUT
    with contextlib.suppress(BusError), Bus(TIMEOUT) as bus:
        reason = judge(unit, bus.list_jobs())
        timeout = bus.stop_timeout(unit)
        if reason is StopReason.NO_JOB:
            clean = not failed and bus.result(unit) == "success"
            if not restart_follows(bus.restart_policy(unit), clean=clean):
                reason = StopReason.STOP
    return StopJob(reason, timeout)


def restart_follows(policy: str, *, clean: bool) -> bool:
    """Whether Restart= may start an instance after this one, as far as its end is known."""
    return policy in ("always", "on-success") if clean else policy != "no"


def judge(unit: str, jobs: list[QueuedJob]) -> StopReason:
    """The reason, given all jobs there are."""
    types = {job.unit: job.type for job in jobs}
    match types.get(unit):
        case None:
            return StopReason.NO_JOB
        case "stop" if types.get("soft-reboot.target") == "start":
            return StopReason.SOFT_REBOOT
        case "stop":
            return StopReason.STOP
        case _:
            return StopReason.RESTART
