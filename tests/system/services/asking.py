# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks PID 1 about asked.service, by the function that the first argument names; prints its answer as JSON."""

import json
import subprocess
import sys
from collections.abc import Callable

from upgrader.systemd.bus import Bus
from upgrader.systemd.unit import SocketUnit, Unit
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import BusUnreachable, JobRefused, WaitTimeout

Answer = dict[str, object]


def properties(systemd: Systemd) -> Answer:
    """A unit, asked for by its alias."""
    unit = systemd.unit("alias")
    names = (
        *("id", "load_state", "active_state", "type", "fd_store_max", "fd_store_preserve"),
        *("environment", "fragment_path", "need_daemon_reload", "job_id", "restart"),
        *("stored_fds", "invocation_id", "serves", "settled"),
    )
    found = {name: getattr(unit, name) for name in names}
    return {**found, "names": sorted(unit.names), "release": systemd.release}


def jobs(systemd: Systemd) -> Answer:
    """What becomes of a start, a restart and a stop."""
    states = []
    for submit in (systemd.start, systemd.restart, systemd.stop):
        unit = systemd.unit("asked")
        word = systemd.wait_job(unit, submit(unit), timeout=30)
        unit = systemd.unit("asked")
        states.append((word, unit.active_state, unit.main_pid > 0))
    return {"states": states}


def nothing(systemd: Systemd) -> Answer:
    """How waiting for a job that never comes ends."""
    try:
        systemd.wait_job(systemd.unit("asked"), 1, timeout=0.1)
    except WaitTimeout as error:
        return {"unit": error.unit, "seconds": error.seconds}
    return {}


def masked(systemd: Systemd) -> Answer:
    """How a start of a masked unit ends."""
    try:
        systemd.start(systemd.unit("never"))
    except JobRefused as error:
        return {"unit": error.unit, "operation": error.operation, "reason": error.reason}
    return {}


def lost(systemd: Systemd) -> Answer:
    """How waiting ends if the bus goes away."""
    unit = systemd.unit("asked")
    systemd.watch(unit)
    subprocess.run(["systemctl", "kill", "-s", "KILL", "dbus.service"], check=True)
    try:
        systemd.wait_job(unit, 1, timeout=30)
    except BusUnreachable as error:
        return {"unit": error.unit, "reason": error.reason}
    return {}


def both(systemd: Systemd) -> Answer:
    """What pystemd reads of a unit and its sockets, and whether the library reads the same."""
    subprocess.run(["systemctl", "start", "asked.socket"], check=True)
    unit = systemd.unit("asked")
    sockets = systemd.sockets(unit)
    with Bus(10) as bus:
        again = Unit.from_properties(unit.path, bus.properties(unit.id))
        others = tuple(
            SocketUnit.from_properties(bus.properties(name)) for name in again.triggered_by
        )
    return {
        "same": unit == again and sockets == others,
        "start": unit.exec_start[0].arguments,
        "limits": [unit.kill_mode, unit.oom_policy, unit.uid, unit.user],
        "sockets": [[each.id, each.active, each.name, each.listens] for each in sockets],
    }


QUESTIONS: dict[str, Callable[[Systemd], Answer]] = {
    question.__name__: question for question in (properties, jobs, nothing, masked, lost, both)
}

if __name__ == "__main__":
    with Systemd() as connection:
        print(json.dumps(QUESTIONS[sys.argv[1]](connection)))
