# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drives one upgrade of one unit through PID 1 and judges the outcome; touches no FD and no image.

`migration` is the transfer between two instances; this is what an operator asks for around it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from upgrader.outcome import Outcome, Result, Verb, duration
from upgrader.parameters import boolean
from upgrader.systemd import cause
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.status import Origin, Status
from upgrader.systemd.unit import (
    FdStore,
    JobConflict,
    Unit,
    UnitError,
    WaitTimeout,
    unit_name,
)
from upgrader.systemd.units import Systemd

Progress = Callable[[str], None]

#: First release with FileDescriptorStorePreserve=.
_PRESERVE = 254


class Mode(StrEnum):
    """Who holds the image while no instance runs; the modes that exist."""

    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a unit cannot be upgraded as it is, and what to do about it."""

    cause: str
    remedy: str


def upgrade(
    unit: str,
    mode: Mode = Mode.RESTART,
    *,
    timeout: float | None = None,
    progress: Progress = lambda text: None,
) -> Outcome:
    """Upgrade one unit and wait for the outcome; nothing that can go wrong is raised.

    `timeout` in seconds bounds the wait for the new instance; without it, systemd's own
    TimeoutStopSec= and TimeoutStartSec= do. When it is over, systemd's job goes on.
    """
    begin = time.monotonic()
    try:
        unit = unit_name(unit)
        mode = Mode(mode)
        with Systemd() as systemd:
            outcome = _restart(systemd, unit, timeout, progress)
            outcome = replace(outcome, systemd=systemd.version)
    except UnitError as error:
        outcome = Outcome.of_error(Verb.UPGRADE, unit, error)
    return replace(outcome, seconds=round(time.monotonic() - begin, 6))


def _restart(systemd: Systemd, name: str, timeout: float | None, progress: Progress) -> Outcome:
    unit = systemd.unit(name)
    before = Status.parse(unit.status_text) if unit.serves else None
    refuse_if_busy(systemd, unit)
    obstacle = not_running(systemd, unit) or not_ours(unit)
    if obstacle is None and unit.need_daemon_reload:
        progress(f"{unit.id}: its unit file changed on disk: systemctl daemon-reload")
        systemd.daemon_reload(unit.id)
        unit = systemd.unit(name)
    obstacle = obstacle or settings(unit)
    if obstacle is not None or before is None:
        result = Result.OLD_SERVES if unit.serves else Result.NOT_SERVING
        return _outcome(unit, result, obstacle, before=before)
    warnings = limits(systemd, unit)
    for warning in warnings:
        progress(f"{unit.id}: warning: {warning}")
    progress(f"{unit.id}: runs {before}")
    since = time.monotonic_ns() // 1000
    # Else StartLimitBurst= may refuse the start of a service that the same job has just stopped.
    systemd.reset_failed(unit.id)
    job = systemd.restart(unit)
    progress(f"{unit.id}: systemd restarts it (job {job})")
    try:
        word, now = follow(systemd, unit, job, timeout, progress)
        outcome = _judge(systemd, unit, now, before, word, since)
    except WaitTimeout as error:
        outcome = _overdue(systemd, unit, error)
    except UnitError as error:
        outcome = Outcome.of_error(Verb.UPGRADE, unit.id, error, Result.UNKNOWN)
    return replace(outcome, before=before, warnings=warnings + outcome.warnings)


def refuse_if_busy(systemd: Systemd, unit: Unit) -> None:
    """Raise JobConflict if a job of this unit is in flight."""
    if unit.job_id and (job := systemd.job(unit)):
        raise JobConflict(unit.id, f"a {job.kind} job (id {job.id}) is {job.state}")


def not_running(systemd: Systemd, unit: Unit) -> Obstacle | None:
    """The obstacle that there is no instance to upgrade."""
    if unit.serves:
        return None
    if unit.load_state != "loaded":
        reason = f": {unit.load_error}" if unit.load_error else ""
        return Obstacle(
            f"the unit is {unit.load_state}{reason}", f"see: systemctl status {unit.id}"
        )
    parked = parked_image(systemd.fd_store(unit))
    kept = f"; it loads the parked image{_of(parked)}" if parked is not None else ""
    if unit.retries:
        return Obstacle(
            "it is not running: systemd is between two attempts to start it",
            f"put a good version in place, then: systemctl restart {unit.id}{kept}",
        )
    state = f"failed: {unit.result}" if unit.active_state == "failed" else unit.active_state
    return Obstacle(
        f"it is not running ({state})",
        f"start it: systemctl start {unit.id}{kept}",
    )


def not_ours(unit: Unit) -> Obstacle | None:
    """The obstacle that the running instance does not use the library."""
    if Status.parse(unit.status_text) is not None:
        return None
    says = (
        f"its status text is {unit.status_text!r}" if unit.status_text else "it has no status text"
    )
    return Obstacle(
        f"it does not use upgrader ({says})",
        f"for a plain restart, which drops connections and state: systemctl restart {unit.id}",
    )


def settings(unit: Unit) -> Obstacle | None:
    """A setting of the unit that would lose the image."""

    def change(found: str, effect: str, wanted: str) -> Obstacle:
        return Obstacle(
            f"{found} in the unit: {effect}",
            f"systemctl edit {unit.id}, and below [Service] write {wanted}",
        )

    if unit.type not in ("notify", "notify-reload"):
        return change(f"Type={unit.type}", "systemd does not wait for READY=1", "Type=notify")
    if unit.fd_store_max == 0:
        return change(
            "FileDescriptorStoreMax=0",
            "systemd would keep nothing over a restart",
            "FileDescriptorStoreMax=64",
        )
    if unit.notify_access == "none":
        return change("NotifyAccess=none", "systemd ignores what it says", "NotifyAccess=exec")
    if unit.fd_store_preserve == "no":
        return change(
            "FileDescriptorStorePreserve=no",
            "systemd would throw the image away",
            "FileDescriptorStorePreserve=yes",
        )
    if unit.stored_fds >= unit.fd_store_max:
        return change(
            f"FileDescriptorStoreMax={unit.fd_store_max}",
            "the FD store is full, and systemd drops more without a word",
            f"FileDescriptorStoreMax={max(64, 2 * unit.fd_store_max)}",
        )
    for setting in unit.environment:
        name, _, value = setting.partition("=")
        if name == "UPGRADER_DISCARD" or (name == "UPGRADER" and is_off(value)):
            return Obstacle(
                f"Environment={setting} in the unit: it would start without the image",
                f"remove it (systemctl cat {unit.id} shows where), then: systemctl daemon-reload",
            )
    return None


def is_off(value: str) -> bool:
    """Whether UPGRADER= has this value as a kill switch."""
    try:
        return not boolean(value)
    except ValueError:
        return False


def limits(systemd: Systemd, unit: Unit) -> tuple[str, ...]:
    """What would be lost if the new version does not start; no obstacle."""
    if unit.fd_store_preserve == "yes":
        return ()
    why = (
        f"systemd {systemd.release} is older than {_PRESERVE}"
        if systemd.release < _PRESERVE
        else f"FileDescriptorStorePreserve={unit.fd_store_preserve}"
    )
    if unit.restart == "no":
        return (f"a new version that does not start loses the image at once ({why}, Restart=no)",)
    return (f"after a failed start the image is kept only while automatic restarts go on ({why})",)


def parked_image(store: FdStore, others: int = 0) -> int | None:
    """The generation of the newest parked image, or None if there is none.

    Before systemd 254 names cannot be read: 0, if there are more FDs than the `others` known.
    """
    if store.names is None:
        return 0 if store.count > others else None
    found = [StoreName.parse(name) for name in store.names]
    parked = [int(name.item) for name in found if name and name.what is Stored.CHANNEL]
    return max(parked, default=None)


def follow(
    systemd: Systemd, unit: Unit, job: int, timeout: float | None, progress: Progress
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
            if now.settled:
                return word, now
    raise AssertionError("unreachable")


_PHASES = {
    "deactivating": "the old instance stops",
    "activating": "the new instance starts",
    "active": "ready",
}


def _judge(
    systemd: Systemd, unit: Unit, now: Unit, before: Status, word: str, since: int
) -> Outcome:
    after = Status.parse(now.status_text) if now.serves else None
    pause = (now.active_enter_usec - now.active_exit_usec) / 1e6 if now.serves else None
    if after and after.origin is Origin.RESTART and after.source_generation == before.generation:
        took = f" in {duration(pause)}" if pause else ""
        return replace(
            _outcome(now, Result.DONE),
            done=f"upgraded{took}: {after}",
            after=after,
            pause_seconds=pause,
            warnings=_left_behind(after),
        )
    entries = cause.read(unit.id, since)
    if now.serves:
        obstacle = _without_image(unit, now, before, after, entries)
        if (parked := parked_image(systemd.fd_store(now), unit.stored_fds)) is not None:
            kept = f"the image{_of(parked)} is still parked; the next start loads it if it can"
            obstacle = replace(obstacle, remedy=f"{kept}\n{obstacle.remedy}")
        outcome = _outcome(now, Result.WITHOUT_IMAGE, obstacle)
        return replace(outcome, after=after, pause_seconds=pause)
    if word == "canceled":
        why = "the restart job was cancelled or replaced by another one"
    else:
        why = cause.cause(entries, now, old_invocation=unit.invocation_id).text
    return _outcome(
        now, Result.NOT_SERVING, Obstacle(why, what_to_do(systemd, now, unit.stored_fds))
    )


def _left_behind(after: Status) -> tuple[str, ...]:
    if not after.left_behind:
        return ()
    return (f"{after.left_behind} connections could not be kept and were drained",)


def _without_image(
    unit: Unit,
    now: Unit,
    before: Status,
    after: Status | None,
    entries: tuple[cause.Entry, ...],
) -> Obstacle:
    reported = cause.reported(entries)
    see = f"see: journalctl -u {unit.id}"
    if after is None:
        return Obstacle("the new instance does not use upgrader", see)
    if after.source_generation is not None:
        return Obstacle(
            f"it loaded the image of generation {after.source_generation}, while generation"
            f" {before.generation} served last",
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


def what_to_do(systemd: Systemd, unit: Unit, others: int = 0) -> str:
    """The way back after a failed start: where the image is, and how it is loaded or dropped.

    `others` counts the FDs that were stored while the unit served.
    """
    parked = parked_image(systemd.fd_store(unit), others)
    if parked is None:
        return (
            "the image is lost; put a good version in place, and start it cold:"
            f" systemctl start {unit.id}"
        )
    kept = f"the image{_of(parked)} is kept"
    discard = f"to start without the image: upgrader discard {unit.id}"
    if unit.retries:
        if limits(systemd, unit):
            kept += " only while systemd goes on trying"
        return (
            f"{kept}; put a good version in place, and the next attempt loads it\n"
            f"to try at once: systemctl restart {unit.id}\n{discard}"
        )
    soon = ""
    if unit.active_state == "failed" and unit.restart != "no":  # so it met the start limit
        soon = f", at least {unit.start_limit_usec / 1e6:g}s after the last attempt"
    return f"{kept}; put a good version in place, then{soon}: systemctl start {unit.id}\n{discard}"


def _of(generation: int) -> str:
    return f" of generation {generation}" if generation else ""


def _outcome(
    unit: Unit, result: Result, obstacle: Obstacle | None = None, before: Status | None = None
) -> Outcome:
    cause, remedy = (obstacle.cause, obstacle.remedy) if obstacle else ("", "")
    return Outcome(Verb.UPGRADE, unit.id, result, cause=cause, remedy=remedy, before=before)
