# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restart mode: one unit restarted into its new version through PID 1, and judged.

What the new main process says of itself counts; the journal explains a failure.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

from upgrader.codes import Code
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink_types import Description
from upgrader.protocol.wording import show_duration
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.unit import Unit
from upgrader.tool import failure_cause, instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.before_restart import await_drains, settle
from upgrader.tool.blockers import Obstacle, of_generation, parked_image, what_to_do
from upgrader.tool.instance_client import InstanceError
from upgrader.tool.outcome import Outcome, Result
from upgrader.tool.startable import startable
from upgrader.tool.unit_errors import UnitError, WaitTimeout
from upgrader.tool.verdict import INTRODUCTION

#: Seconds that a new instance may take from its READY=1 to its first word, at most.
_LONGEST = 90.0


_REMEDIES = {
    Code.BUSY_WORK: "try again when that is done, or raise drain-timeout",
    Code.SOURCE_FAILED: "a restart now would lose everything that it holds; try again later",
}


def restart(attempt: Attempt) -> Outcome:
    """Restart one unit and wait for the outcome; raises UnitError only if nothing was done."""
    if found := _unsavable(attempt):
        problem, remedy = found
        return attempt.failed(Result.OLD_SERVES, problem, remedy, code=Code.SOURCE_FAILED)
    cut = await_drains(attempt)
    try:
        cut += settle(attempt)
    except InstanceError as error:
        return attempt.failed(
            Result.OLD_SERVES,
            error.message,
            _REMEDIES.get(error.code, "try again later"),
            code=error.code,
        )
    return replace(outcome := _restart(attempt), warnings=(*outcome.warnings, *cut))


def _restart(attempt: Attempt) -> Outcome:
    systemd, unit = attempt.systemd, attempt.unit
    # Else StartLimitBurst= may refuse the start of a service that the same job has just stopped.
    with startable(systemd, unit):
        job = systemd.restart(unit)
        attempt.say(f"systemd restarts it (job {job})")
        return await_restart(attempt, job)


def _unsavable(attempt: Attempt) -> tuple[str, str] | None:
    """Which states the running instance could not park, or its own version not load again; and what to do."""
    if attempt.before is None or attempt.before.interface == 1:
        return None
    trials = attempt.before.trials
    with contextlib.suppress(InstanceError):  # then as of the last time
        trials = instance_client.try_states(attempt.unit, user=attempt.systemd.user)
    name = attempt.unit.id
    if problems := [f"state {t.name!r} cannot be saved: {t.problem}" for t in trials if t.problem]:
        remedy = f"keep what cannot be saved out of the state; systemctl restart {name} begins without it"
        return "; ".join(problems), remedy
    if problems := [
        f"state {trial.name!r} could not be loaded again by the version that runs: {trial.unreadable}"
        for trial in trials
        if trial.unreadable
    ]:
        remedy = (
            f"install a version that can load it, then systemctl restart {name}, or upgrade live"
        )
        return "; ".join(problems), remedy
    return None


def await_restart(attempt: Attempt, job: int) -> Outcome:
    """Wait for the end of a restart job, and judge what became of the upgrade."""
    try:
        word, now = attempt.follow(job)
        return _judge(attempt, now, word)
    except WaitTimeout as error:
        return _overdue(attempt, error)
    except UnitError as error:
        return attempt.lost(error)


def _judge(attempt: Attempt, now: Unit, word: str) -> Outcome:
    unit = attempt.unit
    now, main = _main(attempt, now)
    if not now.serves:
        return _not_serving(attempt, now, word)
    after = instance_client.status(main) if main else None
    # An instance that has loaded nothing knows of no pause.
    pause = (now.active_enter_usec - now.active_exit_usec) / 1e6
    if after and after.pause is not None:
        pause = after.pause
    if after and after.origin is Origin.RESTART and _expected(attempt, after):
        return attempt.done(f"upgraded in {attempt.took}: {after}", after, pause)
    if after and after.origin is Origin.UNKNOWN:
        cause_, see = f"unknown (library {after.library})", f"see: journalctl -u {unit.id}"
        return attempt.failed(Result.UNDECIDED, cause_, see, after=after, pause=pause)
    obstacle = _without_image(attempt, now, after)
    if (parked := parked_image(attempt.systemd.fd_store(now), unit.stored_fds)) is not None:
        kept = (
            f"the image{of_generation(parked)} is still parked; the next start loads it if it can"
        )
        obstacle = replace(obstacle, remedy=f"{kept}\n{obstacle.remedy}")
    return attempt.failed(
        Result.WITHOUT_IMAGE, obstacle.cause, obstacle.remedy, after=after, pause=pause
    )


def _main(attempt: Attempt, now: Unit) -> tuple[Unit, Description | None]:
    """The unit and what its main process says, once it says something or serves no more.

    READY=1 alone is nothing: any program may send it, and fail afterwards. One that does not use the
    library is told from that only by the time that a start may take.
    """
    span = min(now.timeout_start_usec / 1e6, _LONGEST)
    if attempt.timeout is not None:
        span = min(span, attempt.timeout)
    deadline = time.monotonic() + max(span, INTRODUCTION)
    while now.serves and (left := deadline - time.monotonic()) > 0:
        if main := instance_client.introduced(attempt.systemd, now, left):
            return now, main
        now = attempt.systemd.unit(now.id)
    return now, None


def _not_serving(attempt: Attempt, now: Unit, word: str) -> Outcome:
    systemd, unit = attempt.systemd, attempt.unit
    tried = now.invocation_id != unit.invocation_id  # the new version was started
    stopped = now.active_state == "inactive" and now.result == "success"
    if word == "canceled":
        why = "the restart job was cancelled or replaced by another one"
    else:
        entries = failure_cause.read(unit, attempt.since, user=systemd.user)
        why = failure_cause.cause(
            entries, now, old_invocation=unit.invocation_id, written=attempt.output.lines()
        ).text
    remedy = what_to_do(systemd, now, unit.stored_fds)
    bad = tried and not stopped
    return attempt.failed(Result.NOT_SERVING, why, remedy, bad_version=bad, now=now)


def _expected(attempt: Attempt, after: Status) -> bool:
    """Whether it was loaded from the instance before, as far as that was known."""
    return attempt.before is None or after.source_generation == attempt.generation


def _without_image(attempt: Attempt, now: Unit, after: Status | None) -> Obstacle:
    unit, see = attempt.unit, f"see: journalctl -u {attempt.unit.id}"
    entries = failure_cause.read(unit, attempt.since, user=attempt.systemd.user)
    if after is None:
        return Obstacle("the new instance does not use upgrader, or does not answer", see)
    if after.source_generation is not None:
        before = attempt.generation
        return Obstacle(
            f"it loaded the image of generation {after.source_generation}"
            + (f", while generation {before} served last" if before else ""),
            see,
        )
    reported = failure_cause.reported(entries)
    if after.set_aside:
        why = f": {reported}" if reported else ""
        return Obstacle(
            f"the image of generation {after.set_aside} could not be loaded{why}",
            f"it is kept in the FD store as {StoreName(Stored.ASIDE, str(after.set_aside))}\n{see}",
        )
    if _was_killed(unit, entries):
        span = f"{now.timeout_stop_usec / 1e6:g}s"
        return Obstacle(
            f"the old instance did not stop within TimeoutStopSec={span} and was killed",
            f"raise TimeoutStopSec=; {see}",
        )
    return Obstacle(reported or "the new instance found no image to load", see)


def _was_killed(unit: Unit, entries: Sequence[failure_cause.JournalEntry]) -> bool:
    return any(
        entry.invocation == unit.invocation_id and entry.fields.get("UNIT_RESULT") == "timeout"
        for entry in entries
    )


def _overdue(attempt: Attempt, error: WaitTimeout) -> Outcome:
    unit = attempt.unit
    now = attempt.systemd.unit(unit.id)
    untouched = now.serves and now.invocation_id == unit.invocation_id
    return attempt.failed(
        Result.OLD_SERVES if untouched else Result.NOT_SERVING,
        f"not ready after {show_duration(error.seconds)} (--timeout), it is {now.active_state}",
        f"the restart goes on in systemd; see: systemctl status {unit.id}",
        now=now,
    )
