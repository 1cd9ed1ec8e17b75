# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mode exec: the instance of one unit becomes its new version in the same process, and is judged.

PID 1 has no part in it and no job for it: the instance itself is asked, and what PID 1 says of the
unit afterwards is believed.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from upgrader import instances
from upgrader.instances import InstanceError
from upgrader.obstacles import what_to_do
from upgrader.outcome import Mode, Outcome, Progress, Result, Verb, duration
from upgrader.restarting import left_behind
from upgrader.systemd import cause
from upgrader.systemd.status import Origin, Status
from upgrader.systemd.unit import JobConflict, Unit, WaitTimeout
from upgrader.systemd.units import Systemd


def execute(
    systemd: Systemd,
    unit: Unit,
    before: Status,
    timeout: float | None,
    progress: Progress,
    command: Sequence[str] = (),
) -> Outcome:
    """Upgrade one unit by an execve(2) of `command` (without one, of what ExecStart= says).

    Raises UnitError only if nothing was done. Without a `timeout`, the new version may take as long
    as TimeoutStartSec= allows a start.
    """
    outcome = Outcome(Verb.UPGRADE, unit.id, Result.DONE, mode=Mode.EXEC, before=before)
    begin = time.monotonic_ns() // 1000
    systemd.watch(unit)
    progress(f"{unit.id}: process {unit.main_pid} becomes the new version")
    try:
        instances.execute(unit, command, user=systemd.user)
    except InstanceError as error:
        if error.name == "Busy":
            raise JobConflict(unit.id, error.message) from error
        return replace(
            outcome, result=Result.OLD_SERVES, cause=error.message, remedy=error.remedy,
            bad_version=error.name == "ExecFailed",
        )  # fmt: skip
    limit = timeout if timeout is not None else unit.timeout_start_usec / 1e6
    try:
        now = _settled(systemd, unit, before, limit)
    except WaitTimeout:
        return replace(
            outcome,
            result=Result.NOT_SERVING,
            cause=f"the new version was not ready after {limit:g}s",
            remedy="put a good version in place, then restart it, which loads what was kept:"
            f" systemctl restart {unit.id}",
            bad_version=timeout is None,
        )
    after = Status.parse(now.status_text) if now.serves else None
    if after and after.generation > before.generation and after.origin is Origin.EXEC:
        took = duration((time.monotonic_ns() // 1000 - begin) / 1e6)
        return replace(
            outcome, done=f"upgraded in {took}: {after}", after=after,
            pause_seconds=after.pause, warnings=left_behind(after),
        )  # fmt: skip
    entries = cause.read(unit, begin, user=systemd.user)
    if now.serves:
        # Restart= has started what ExecStart= says, and that has loaded PID 1's copy, or nothing.
        why = cause.reported(entries) or "the new version has ended"
        kept = after is not None and after.origin is Origin.RESTART
        return replace(
            outcome,
            result=Result.OLD_SERVES if kept else Result.WITHOUT_IMAGE,
            cause=f"{why}; systemd has started it again: {now.status_text}",
            remedy=f"see: journalctl -u {unit.id}",
            bad_version=True,
            after=after,
        )
    return replace(
        outcome,
        result=Result.NOT_SERVING,
        cause=cause.cause(entries, now).text,
        remedy=what_to_do(systemd, now),
        bad_version=True,
    )


def _settled(systemd: Systemd, unit: Unit, before: Status, limit: float) -> Unit:
    """The unit once the new version says that it is there, or has ended; raises WaitTimeout."""
    now = systemd.unit(unit.id)
    if not _decided(now, before):
        for _ in systemd.changes(unit, limit):
            now = systemd.unit(unit.id)
            if _decided(now, before):
                break
    return now


def _decided(now: Unit, before: Status) -> bool:
    if not now.serves:
        return now.settled and not now.retries
    status = Status.parse(now.status_text)
    # "failed to load" is said before the process ends.
    return status is not None and status.generation != before.generation
