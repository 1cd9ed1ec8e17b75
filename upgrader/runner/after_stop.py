# SPDX-License-Identifier: LGPL-2.1-or-later
"""ExecStopPost= of a runner's unit: ends what is left of it, unless another runner will go on with it; then
that finds the paths of its listeners."""

import os
import signal
import time

from upgrader.errors import BusError
from upgrader.runner.kept_paths import put_back, remove_links
from upgrader.runner.options import RunnerOptions
from upgrader.runner.processes import RunningProcess, end, members, parent
from upgrader.systemd.bus import Bus
from upgrader.systemd.cgroup import directory, own_unit
from upgrader.systemd.live_limits import runner_arguments
from upgrader.systemd.own_unit import StopReason, judge
from upgrader.systemd.unit import UNSET, Unit

_BUS = 5.0  # seconds
_SHARE = 0.8  # of TimeoutStopSec=, which bounds ExecStopPost= as well
_HARD = 1.0  # seconds for SIGTERM, after the drain signal
_DEFAULT = 90e6  # microseconds: DefaultTimeoutStopSec=
#: Results after which Restart= starts the unit again; systemd.service(5), "Restart=".
_RESTARTS = {
    "no": set[str](),
    "on-success": {"success"},
    "on-failure": {
        "exit-code",
        "signal",
        "core-dump",
        "timeout",
        "watchdog",
        "oom-kill",
        "protocol",
    },
    "on-abnormal": {"signal", "core-dump", "timeout", "watchdog", "oom-kill"},
    "on-abort": {"signal", "core-dump"},
    "on-watchdog": {"watchdog"},
}


def end_left_over() -> int:
    """End all processes of the unit but this one, if nothing starts it again; the exit code."""
    name = own_unit()
    try:
        with Bus(_BUS) as bus:
            unit = Unit.from_properties(name, bus.properties(name))
            reason = judge(name, bus.list_jobs())
    except BusError as error:
        print(f"systemd cannot be asked, so all is left as it is: {error}")
        return 1
    options = _options(unit)
    listen = options.listen if options else ()
    if is_restarted(reason, unit.restart, os.environ.get("SERVICE_RESULT", "success")):
        put_back(listen)
        return 0
    usec = _DEFAULT if unit.timeout_stop_usec == UNSET else unit.timeout_stop_usec
    deadline = time.monotonic() + usec / 1e6 * _SHARE
    here = directory()
    own = {os.getpid()}
    drain = options.drain if options else signal.SIGTERM
    while left := set(members(here)) - own:
        roots = [pid for pid in left if parent(pid) not in left]
        patience = max(deadline - time.monotonic() - _HARD, 0.0)
        end(_processes(roots), ((drain, patience), (signal.SIGTERM, _HARD)))
    remove_links(listen)
    return 0


def is_restarted(reason: StopReason, policy: str, result: str) -> bool:
    """Whether PID 1 starts the unit again, after a stop for this reason that ended so."""
    if reason is StopReason.NO_JOB:
        return policy == "always" or result in _RESTARTS.get(policy, ())
    return reason is not StopReason.STOP


def _processes(pids: list[int]) -> list[RunningProcess]:
    found = []
    for pid in pids:
        try:
            found.append(RunningProcess.of(pid))
        except OSError:  # it has ended
            continue
    return found


def _options(unit: Unit) -> RunnerOptions | None:
    """Those that ExecStart= names."""
    try:
        return RunnerOptions.parse(runner_arguments(unit), os.environ)
    except SystemExit:  # the line is made of variables, say
        return None
