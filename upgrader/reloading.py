# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live mode: one unit reloaded into its new version through PID 1, and judged.

The reload is takeover's; its exit code is not believed, but what PID 1 says of the unit after it.
"""

import contextlib
import threading
import time
from dataclasses import replace

import msgspec

from upgrader import instances
from upgrader.description import Phase
from upgrader.instances import InstanceError
from upgrader.obstacles import Obstacle, what_to_do
from upgrader.outcome import Mode, Outcome, Progress, Result, Verb, duration
from upgrader.parameters import FD_STORE_ONLY, Mechanism
from upgrader.restarting import follow, left_behind
from upgrader.systemd import cause
from upgrader.systemd.live_limits import (
    DYNAMIC_USERS,
    RESTART,
    Limit,
    LimitKind,
    Running,
    live_limits,
)
from upgrader.systemd.status import Origin, Status
from upgrader.systemd.unit import Unit, UnitError, WaitTimeout
from upgrader.systemd.units import Systemd
from upgrader.takeover import ENDED, HALFWAY

#: Seconds for the first words of a new main process; it takes milliseconds.
_INTRODUCTION = 5.0
#: What takeover says before the cause.
_REFUSED = "not upgraded, the running instance serves on: "


def limits(systemd: Systemd, unit: Unit) -> tuple[Limit, ...]:
    """What forbids to upgrade this unit live, first what to mend first."""
    found = live_limits(unit) or _turned_away(systemd, unit)
    if found:
        return found
    try:
        said = instances.describe(unit, user=systemd.user)
    except InstanceError as error:
        return (Limit(LimitKind.INSTANCE, error.message, error.remedy),)
    if said.parameters.get("backend-transfer-mechanism") == Mechanism.FD_STORE:
        return (Limit(LimitKind.INSTANCE, FD_STORE_ONLY, RESTART.format(unit=unit.id)),)
    running = Running.from_description(msgspec.to_builtins(said))
    return live_limits(unit, running, systemd.sockets(unit))


def _turned_away(systemd: Systemd, unit: Unit) -> tuple[Limit, ...]:
    """Takeover asks PID 1 as the user of the service, and dbus-daemon takes no connection of a user
    that it cannot look up: PID 1, which would know a dynamic one, must not be asked by it."""
    if systemd.user or unit.uid not in DYNAMIC_USERS:
        return ()
    try:
        # Of dbus-broker.service it is an alias.
        daemon = systemd.unit("dbus.service").id == "dbus.service"
    except UnitError:
        daemon = False
    if not daemon:
        return ()
    return (
        Limit(
            LimitKind.BUS,
            "DynamicUser=: dbus-daemon turns its users away, and takeover has to ask systemd",
            "User= with a user of systemd-sysusers, or dbus-broker as the bus",
        ),
    )


def reload(
    systemd: Systemd, unit: Unit, before: Status, timeout: float | None, progress: Progress
) -> Outcome:
    """Upgrade one unit live and wait for the outcome; raises UnitError only if nothing was done."""
    # A reload with nothing changed is the author's own; this one is asked for.
    try:
        instances.expect(unit, user=systemd.user)
    except InstanceError as error:
        raise UnitError(unit.id, error.message, remedy=error.remedy) from error
    threading.Thread(
        target=_tell_phases, args=(systemd, unit, progress), name="phases", daemon=True
    ).start()
    since = time.monotonic_ns() // 1000
    job = systemd.reload(unit)
    progress(f"{unit.id}: systemd reloads it (job {job})")
    return await_reload(systemd, unit, before, job, since, timeout, progress)


def _tell_phases(systemd: Systemd, unit: Unit, progress: Progress) -> None:
    """Say how it goes, as the running instance tells it; what it says decides nothing."""
    began: float | None = None
    # The instance that is replaced ends in the middle of its answer.
    with contextlib.suppress(InstanceError):
        for migration in instances.phases(unit, user=systemd.user):
            began = migration.began if began is None else began
            if migration.began != began and not migration.phase.ended:
                progress(f"{unit.id}: {migration.phase} ({duration(migration.seconds)})")


def await_reload(
    systemd: Systemd,
    unit: Unit,
    before: Status | None,
    job: int,
    since: int,
    timeout: float | None,
    progress: Progress,
) -> Outcome:
    """Wait for the end of a reload job and judge it; `before` is None for somebody else's job.

    `since`: microseconds of CLOCK_MONOTONIC, from which on the journal speaks of this reload.
    """
    try:
        word, now = follow(systemd, unit, job, timeout, progress, settled=_settled)
        if word == "done" and now.main_pid != unit.main_pid:
            now = _introduced(systemd, unit, now)
        return _judge(systemd, unit, now, before, word, since)
    except WaitTimeout as error:
        now = systemd.unit(unit.id)
        return Outcome(
            Verb.UPGRADE, unit.id, Result.OLD_SERVES if now.serves else Result.NOT_SERVING,
            mode=Mode.LIVE,
            cause=f"not done after {error.seconds:g}s (--timeout), it is {now.active_state}",
            remedy=f"the reload goes on in systemd; see: systemctl status {unit.id}",
        )  # fmt: skip
    except UnitError as error:
        return replace(
            Outcome.of_error(Verb.UPGRADE, unit.id, error, Result.UNKNOWN), mode=Mode.LIVE
        )


def _introduced(systemd: Systemd, old: Unit, now: Unit) -> Unit:
    """The unit once its new main process has said who it is.

    PID 1 listens to it from MAINPID= on, and with that the reload is done: what it says first may
    come after the end of the job.
    """
    with contextlib.suppress(WaitTimeout):
        changes = systemd.changes(now, _INTRODUCTION)
        while now.serves and now.status_text == old.status_text:
            next(changes)
            now = systemd.unit(now.id)
    return now


def _settled(unit: Unit) -> bool:
    # A cancelled reload job ends at once, and what it has started goes on.
    return unit.settled and unit.active_state not in ("reloading", "refreshing")


def _judge(
    systemd: Systemd, unit: Unit, now: Unit, before: Status | None, word: str, since: int
) -> Outcome:
    outcome = Outcome(Verb.UPGRADE, unit.id, Result.DONE, mode=Mode.LIVE, before=before)
    after = Status.parse(now.status_text) if now.serves else None
    # Another reload may have come first: then this one is done as well.
    newer = after is not None and (
        after.generation > before.generation if before else word == "done"
    )
    if after and newer and after.origin in _KEPT:
        return replace(
            outcome,
            done=f"upgraded in {duration((time.monotonic_ns() // 1000 - since) / 1e6)}: {after}",
            after=after,
            pause_seconds=after.pause,
            warnings=left_behind(after),
        )
    entries = cause.read(unit, since, user=systemd.user)
    if not now.serves:
        halfway = any(entry.message.startswith(HALFWAY) for entry in entries)
        interrupted = "" if halfway else cause.interrupted(entries, now)
        return replace(
            outcome,
            result=Result.NOT_SERVING,
            cause=interrupted or cause.cause(entries, now).text.removeprefix(_REFUSED),
            # What is parked for the next start may only be on its way.
            remedy=_look(now) if interrupted else what_to_do(systemd, now),
            bad_version=not interrupted,
        )
    see = f"see: journalctl -u {unit.id}"
    if after is None:
        obstacle = Obstacle("the new instance does not use upgrader", see)
        result = Result.WITHOUT_IMAGE
    elif newer:
        obstacle = Obstacle(f"the new version crashed after it had taken over: {after}", see)
        result = Result.WITHOUT_IMAGE
    elif after.refused == Phase.CANCELLED:  # that says nothing of the version on disk
        return replace(
            outcome,
            result=Result.OLD_SERVES,
            cause="it was cancelled, as somebody wanted",
            after=after,
        )
    else:
        obstacle = Obstacle(
            _why(entries, now, word, after.refused), f"put a good version in place; {see}"
        )
        result = Result.OLD_SERVES
    return replace(
        outcome,
        result=result,
        cause=obstacle.cause,
        remedy=obstacle.remedy,
        bad_version=result is Result.OLD_SERVES and word not in ("done", "canceled"),
        after=after,
    )


def _look(now: Unit) -> str:
    if now.retries:
        return f"systemd starts it again by itself (Restart=); see: systemctl status {now.id}"
    return f"to start it: systemctl start {now.id}"


#: Where everything crossed; the others lost at least the connections.
_KEPT = (Origin.LIVE, Origin.RESTART)


def _why(entries: tuple[cause.Entry, ...], now: Unit, word: str, refused: str) -> str:
    reported = cause.reported(entries)
    if now.reload_result == "timeout":
        span = f"{now.timeout_start_usec / 1e6:g}s"
        return f"the reload took longer than TimeoutStartSec={span}, and systemd ended it"
    if reported:
        reason = reported.removeprefix(_REFUSED)
        if reason.startswith(ENDED):
            # Takeover is the one that reported it, by its standard error as well.
            told = {entry.pid for entry in entries if entry.message.startswith(_REFUSED)}
            if said := cause.last_words(entries, {now.main_pid, *told}):
                return f"{reason}: {said}"
        return reason
    if word == "canceled":
        return "the reload job was cancelled"
    if now.reload_result in ("signal", "core-dump"):
        return "takeover, which ExecReload= runs, was killed"
    if word == "done":
        return "the reload changed nothing"
    if refused:  # not every user may read the journal
        return refused
    return f"the reload ended with {now.reload_result}, and nobody said why"
