# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why PID 1 stops this unit: tells `stop`, `restart` and soft-reboot apart; stops nothing."""

import contextlib
import re
from dataclasses import dataclass
from enum import StrEnum

from upgrader.errors import BusError
from upgrader.systemd.bus import Bus, Job

#: Longest wait for PID 1's answer, in seconds; it adds to the pause of every restart.
TIMEOUT = 0.2
#: DefaultTimeoutStopSec= of systemd, in seconds.
DEFAULT_STOP_TIMEOUT = 90.0

_UNIT = re.compile(r"(?<=/)_?([^/]+\.(?:service|scope))(?=/|$)")


class StopReason(StrEnum):
    """What SIGTERM means this time."""

    STOP = "stop"  #: an admin wants it gone: drain, leave nothing in the FD store
    RESTART = "restart"  #: another instance follows: park
    SOFT_REBOOT = "soft-reboot"  #: its job says "stop", but the FD store survives: park
    NO_JOB = "no-job"  #: a signal sent by hand, say, and Restart= may follow: park
    UNKNOWN = "unknown"  #: no answer: parking loses nothing, draining might


def unit_name(cgroup: str | None = None) -> str:
    """The unit of this process, from its cgroup; empty outside of systemd.

    The last `*.service` component counts: with Delegate=yes there are groups of our own below.
    An underscore in front is systemd's escape of names such as `memory.service`.
    """
    if cgroup is None:
        try:
            with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
                cgroup = file.read()
        except OSError:
            return ""
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (hierarchy == "0" or controllers == "name=systemd") and (found := _UNIT.findall(path)):
            return str(found[-1])
    return ""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why this unit is stopped, and after how many seconds PID 1 sends SIGKILL."""

    reason: StopReason
    timeout: float


def ask(unit: str, *, failed: bool = False) -> Stop:
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
    return Stop(reason, timeout)


def restart_follows(policy: str, *, clean: bool) -> bool:
    """Whether Restart= may start an instance after this one, as far as its end is known."""
    return policy in ("always", "on-success") if clean else policy != "no"


def judge(unit: str, jobs: list[Job]) -> StopReason:
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
