# SPDX-License-Identifier: LGPL-2.1-or-later
"""One upgrade of one unit: chooses the mode, has it done, and leaves a hold if it failed.

`migration` is the transfer between two instances; this is what an operator asks for around it.
"""

import time
from dataclasses import replace

from upgrader import hold
from upgrader.hold import Hold, HoldError
from upgrader.obstacles import Obstacle, kept_only_while, not_ours, not_running, settings
from upgrader.outcome import Mode, Outcome, Progress, Result, Verb
from upgrader.reloading import await_reload, limits, reload
from upgrader.restarting import await_restart, restart
from upgrader.systemd.status import Status
from upgrader.systemd.unit import Job, JobConflict, Unit, UnitError, unit_name
from upgrader.systemd.units import Systemd


def upgrade(
    unit: str,
    mode: Mode | None = None,
    *,
    wait: bool = False,
    timeout: float | None = None,
    progress: Progress = lambda text: None,
) -> Outcome:
    """Upgrade one unit and wait for the outcome; nothing that can go wrong is raised.

    Without a `mode` it is live, or restart where something forbids live, which the outcome then
    says among its warnings. An upgrade that is under way is refused, or followed with `wait`.
    `timeout` in seconds bounds the wait for the new instance; without it, systemd's own
    TimeoutStopSec= and TimeoutStartSec= do. When it is over, systemd's job goes on.

    An upgrade that failed leaves a hold on the unit, and one that is done lifts it.
    """
    begin = time.monotonic()
    try:
        unit = unit_name(unit)
        mode = None if mode is None else Mode(mode)
        with Systemd() as systemd:
            outcome = _upgrade(systemd, unit, mode, wait, timeout, progress)
            outcome = replace(outcome, systemd=systemd.version)
    except UnitError as error:
        outcome = Outcome.of_error(Verb.UPGRADE, unit, error)
    return replace(_held(outcome), seconds=round(time.monotonic() - begin, 6))


def _upgrade(
    systemd: Systemd,
    name: str,
    mode: Mode | None,
    wait: bool,
    timeout: float | None,
    progress: Progress,
) -> Outcome:
    unit = systemd.unit(name)
    if unit.job_id and (job := systemd.job(unit)):
        if not wait:
            raise JobConflict(unit.id, _holder(unit, job))
        if (followed := _follow(systemd, unit, job, timeout, progress)) is not None:
            return followed
        unit = systemd.unit(name)
    before = Status.parse(unit.status_text) if unit.serves else None
    obstacle = not_running(systemd, unit) or not_ours(unit)
    if obstacle is None and unit.need_daemon_reload:
        progress(f"{unit.id}: its unit file changed on disk: systemctl daemon-reload")
        systemd.daemon_reload(unit.id)
        unit = systemd.unit(name)
    obstacle = obstacle or settings(unit)
    if obstacle is not None or before is None:
        return _nothing_done(unit, before, obstacle)
    warnings: tuple[str, ...] = ()
    forbidden = () if mode is Mode.RESTART else limits(systemd, unit)
    if forbidden and mode is Mode.LIVE:
        first = forbidden[0]
        return _nothing_done(unit, before, Obstacle(first.cause, first.remedy))
    if forbidden:
        warnings += (f"not live but by a restart: {forbidden[0]}",)
    chosen = Mode.RESTART if forbidden or mode is Mode.RESTART else Mode.LIVE
    if chosen is Mode.RESTART:
        warnings += kept_only_while(systemd, unit)
    for warning in warnings:
        progress(f"{unit.id}: warning: {warning}")
    progress(f"{unit.id}: runs {before}")
    modes = {Mode.LIVE: reload, Mode.RESTART: restart}
    outcome = modes[chosen](systemd, unit, before, timeout, progress)
    return replace(outcome, before=before, warnings=warnings + outcome.warnings)


def refuse_if_busy(systemd: Systemd, unit: Unit) -> None:
    """Raise JobConflict if a job of this unit is in flight."""
    if unit.job_id and (job := systemd.job(unit)):
        raise JobConflict(unit.id, _holder(unit, job))


def _holder(unit: Unit, job: Job) -> str:
    """Who is in the way, and since when."""
    by = f" (process {unit.control_pid})" if unit.control_pid else ""
    if job.state != "running":
        return f"a {job.kind} job (id {job.id}) is {job.state}{by}"
    age = max(0.0, time.monotonic() - unit.state_change_usec / 1e6)
    return f"a {job.kind} job (id {job.id}) has been running for {age:.1f}s{by}"


def _follow(
    systemd: Systemd, unit: Unit, job: Job, timeout: float | None, progress: Progress
) -> Outcome | None:
    """What becomes of a job that somebody else has asked for; None if it has just ended."""
    waits = {"reload": await_reload, "restart": await_restart}
    if job.kind not in waits:
        raise JobConflict(unit.id, _holder(unit, job))
    systemd.watch(unit)
    if systemd.job(systemd.unit(unit.id)) is None:
        return None
    progress(f"{unit.id}: follows what is under way: {_holder(unit, job)}")
    since = unit.state_change_usec
    return waits[job.kind](systemd, unit, None, job.id, since, timeout, progress)


def _held(outcome: Outcome) -> Outcome:
    """Put a hold on the unit, or lift it."""
    try:
        if outcome.result is Result.DONE:
            hold.lift(outcome.unit)
        elif outcome.bad_version:
            hold.place(Hold.now(outcome.unit, outcome.cause))
    except HoldError as error:
        return replace(outcome, warnings=(*outcome.warnings, str(error)))
    return outcome


def _nothing_done(unit: Unit, before: Status | None, obstacle: Obstacle | None) -> Outcome:
    result = Result.OLD_SERVES if unit.serves else Result.NOT_SERVING
    cause, remedy = (obstacle.cause, obstacle.remedy) if obstacle else ("", "")
    return Outcome(Verb.UPGRADE, unit.id, result, cause=cause, remedy=remedy, before=before)
