# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restart mode: one unit restarted into its new version through PID 1, and judged."""

import time
from collections.abc import Callable
from dataclasses import replace

from upgrader.obstacles import Obstacle, of_generation, parked_image, what_to_do
from upgrader.outcome import Mode, Outcome, Progress, Result, Verb, duration
from upgrader.startable import startable
from upgrader.systemd import cause
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.status import Origin, Status
from upgrader.systemd.unit import Unit, UnitError, WaitTimeout
from upgrader.systemd.units import Systemd


def restart(
    systemd: Systemd, unit: Unit, before: Status, timeout: float | None, progress: Progress
) -> Outcome:
    """Restart one unit and wait for the outcome; raises UnitError only if nothing was done."""
    since = time.monotonic_ns() // 1000
    # Else StartLimitBurst= may refuse the start of a service that the same job has just stopped.
    with startable(systemd, unit):
        job = systemd.restart(unit)
        progress(f"{unit.id}: systemd restarts it (job {job})")
        return await_restart(systemd, unit, before, job, since, timeout, progress)


def await_restart(
    systemd: Systemd,
    unit: Unit,
    before: Status | None,
    job: int,
    since: int,
    timeout: float | None,
    progress: Progress,
) -> Outcome:
    """Wait for the end of a restart job and judge it; `since` as for `await_reload`."""
    try:
        word, now = follow(systemd, unit, job, timeout, progress)
        return _judge(systemd, unit, now, before, word, since)
    except WaitTimeout as error:
        return _overdue(systemd, unit, error)
    except UnitError as error:
        return replace(
            Outcome.of_error(Verb.UPGRADE, unit.id, error, Result.UNKNOWN), mode=Mode.RESTART
        )


def follow(
    systemd: Systemd,
    unit: Unit,
    job: int,
    timeout: float | None,
    progress: Progress,
    settled: Callable[[Unit], bool] = lambda unit: unit.settled,
) -> tuple[str, Unit]:
    """Wait for the end of the job and for the unit to settle; returns PID 1's word and the unit.

    Raises WaitTimeout. PID 1 is asked nothing before the job has ended: that would be pause.
    """
    begin = time.monotonic()
    phase, word = "", ""
    for change in systemd.changes(unit, timeout):
        state = change.values.get("ActiveState", b"").decode()
        # Until the stop begins, PID 1 says that the old instance is active.
        if _PHASES.get(state, phase) != phase and (phase or state != "active"):
            phase = _PHASES[state]
            progress(f"{unit.id}: {phase} ({duration(time.monotonic() - begin)})")
        if change.job_id == job:
            word = change.job_result
        # Between the failure and the next attempt of its own, PID 1 goes through "failed".
        if word and (change.job_id == job or "ActiveState" in change.values):
            now = systemd.unit(unit.id)
            if settled(now):
                return word, now
    raise AssertionError("unreachable")


_PHASES = {
    "deactivating": "the old instance stops",
    "activating": "the new instance starts",
    "active": "ready",
}


def _judge(
    systemd: Systemd, unit: Unit, now: Unit, before: Status | None, word: str, since: int
) -> Outcome:
    after = Status.parse(now.status_text) if now.serves else None
    pause = (now.active_enter_usec - now.active_exit_usec) / 1e6 if now.serves else None
    if after and after.origin is Origin.RESTART and _expected(after, before, word):
        took = f" in {duration(pause)}" if pause else ""
        return replace(
            _outcome(now, Result.DONE),
            done=f"upgraded{took}: {after}",
            after=after,
            pause_seconds=pause,
            warnings=left_behind(after),
        )
    entries = cause.read(unit, since, user=systemd.user)
    if now.serves:
        obstacle = _without_image(unit, now, before, after, entries)
        if (parked := parked_image(systemd.fd_store(now), unit.stored_fds)) is not None:
            kept = f"the image{of_generation(parked)} is still parked; the next start loads it if it can"
            obstacle = replace(obstacle, remedy=f"{kept}\n{obstacle.remedy}")
        outcome = _outcome(now, Result.WITHOUT_IMAGE, obstacle)
        return replace(outcome, after=after, pause_seconds=pause)
    if word == "canceled":
        why = "the restart job was cancelled or replaced by another one"
    else:
        why = cause.cause(entries, now, old_invocation=unit.invocation_id).text
    outcome = _outcome(
        now, Result.NOT_SERVING, Obstacle(why, what_to_do(systemd, now, unit.stored_fds))
    )
    return replace(outcome, bad_version=word != "canceled")


def _expected(after: Status, before: Status | None, word: str) -> bool:
    return after.source_generation == before.generation if before else word == "done"


def left_behind(after: Status) -> tuple[str, ...]:
    """A warning if not everything could cross."""
    if not after.left_behind:
        return ()
    return (f"{after.left_behind} connections could not be kept and were drained",)


def _without_image(
    unit: Unit,
    now: Unit,
    before: Status | None,
    after: Status | None,
    entries: tuple[cause.Entry, ...],
) -> Obstacle:
    reported = cause.reported(entries)
    see = f"see: journalctl -u {unit.id}"
    if after is None:
        return Obstacle("the new instance does not use upgrader", see)
    if after.source_generation is not None:
        return Obstacle(
            f"it loaded the image of generation {after.source_generation}"
            + (f", while generation {before.generation} served last" if before else ""),
            see,
        )
    if after.set_aside:
        why = f": {reported}" if reported else ""
        return Obstacle(
            f"the image of generation {after.set_aside} could not be loaded{why}",
            f"it is kept in the FD store as {StoreName(Stored.ASIDE, str(after.set_aside))}\n{see}",
        )
    stopped = any(
        entry.invocation == unit.invocation_id and entry.fields.get("UNIT_RESULT") == "timeout"
        for entry in entries
    )
    if stopped:
        span = f"{now.timeout_stop_usec / 1e6:g}s"
        return Obstacle(
            f"the old instance did not stop within TimeoutStopSec={span} and was killed",
            f"raise TimeoutStopSec=; {see}",
        )
    return Obstacle(reported or "the new instance found no image to load", see)


def _overdue(systemd: Systemd, unit: Unit, error: WaitTimeout) -> Outcome:
    now = systemd.unit(unit.id)
    result = Result.OLD_SERVES if now.invocation_id == unit.invocation_id else Result.NOT_SERVING
    if not now.serves:
        result = Result.NOT_SERVING
    return _outcome(
        now,
        result,
        Obstacle(
            f"not ready after {error.seconds:g}s (--timeout), it is {now.active_state}",
            f"the restart goes on in systemd; see: systemctl status {unit.id}",
        ),
    )


def _outcome(unit: Unit, result: Result, obstacle: Obstacle | None = None) -> Outcome:
    cause, remedy = (obstacle.cause, obstacle.remedy) if obstacle else ("", "")
    return Outcome(Verb.UPGRADE, unit.id, result, mode=Mode.RESTART, cause=cause, remedy=remedy)
