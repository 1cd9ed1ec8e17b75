# SPDX-License-Identifier: LGPL-2.1-or-later
"""One upgrade of one unit: chooses the mode, has it done, and leaves a hold if it failed.

`migration` is the transfer between two instances; this is what an operator asks for around it.
"""

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from upgrader.codes import Code
from upgrader.protocol.parameters import Mode
from upgrader.protocol.phase import Decision
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink_types import Description
from upgrader.protocol.wording import show_duration
from upgrader.systemd.process_start import process_started
from upgrader.systemd.unit import Job, Unit
from upgrader.tool import counts, hold, instance_client, overview
from upgrader.tool.attempt import Attempt
from upgrader.tool.before_restart import draining
from upgrader.tool.blockers import Obstacle, kept_only_while, not_ours, not_running, settings
from upgrader.tool.changed import changes
from upgrader.tool.credentials import show_stale, stale_credentials
from upgrader.tool.exec_mode import execute
from upgrader.tool.hold import Hold, HoldError
from upgrader.tool.live_mode import await_reload, limits, reload
from upgrader.tool.outcome import Outcome, Result, Tell, Verb
from upgrader.tool.output_files import OutputFiles
from upgrader.tool.preflight import objection, preflight
from upgrader.tool.presence import look
from upgrader.tool.restart_mode import await_restart, restart
from upgrader.tool.start_failed import is_kept, start_again
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import JobConflict, NoMatchingUnit, NoSuchUnit, UnitError, unit_name
from upgrader.tool.without_root import (
    for_root_only,
    may_reload_files,
    may_steer,
    restart_by_name,
)

_PATTERN = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Without a `mode` it is the one that the instance has as its parameter; AUTO is live, or restart
    where something forbids live, which the outcome then says among its warnings. In mode exec,
    `command` is executed instead of what ExecStart= says. An upgrade that is under way is refused,
    or followed with `wait`. With `preflight`, the new version is tried first, before any
    mode, if the unit can be upgraded live; without one or the other, if the instance wants that. With `if_changed`, nothing
    is done if nothing has changed since the service was started; with `dry_run`, nothing is done but
    to find out what would be. `timeout` in seconds bounds the wait for the new instance;
    without it, systemd's own TimeoutStopSec= and TimeoutStartSec= do. When it is over, systemd's job
    goes on.

    `asked`: since when the upgrade has been wanted, in seconds of CLOCK_BOOTTIME, by default now.
    An instance that somebody else's upgrade has started after that is the version wanted.
    """

    mode: Mode | None = None
    command: Sequence[str] = ()
    wait: bool = False
    preflight: bool | None = None
    if_changed: bool = False
    dry_run: bool = False
    timeout: float | None = None
    asked: float | None = None


def upgrade(
    unit: str,
    wish: Wish = Wish(),
    *,
    user: bool = False,
    progress: Tell = lambda text: None,
) -> Outcome:
    """Upgrade one unit and wait for the outcome; nothing that can go wrong is raised.

    `user`: a unit of this user's own service manager. A unit that an admin has put on hold is left
    alone. A unit that has failed, and for which PID 1
    holds what an instance left, is started with that. An upgrade that failed by the fault of the new
    version leaves a hold on the unit, and one that is done lifts it.
    """
    begin = time.monotonic()
    if wish.asked is None:
        wish = replace(wish, asked=time.clock_gettime(time.CLOCK_BOOTTIME))
    try:
        unit = unit_name(unit)
        with Systemd(user=user) as systemd:
            outcome = replace(
                _upgrade(systemd, unit, wish, progress, begin), systemd=systemd.version
            )
            outcome = replace(outcome, seconds=round(time.monotonic() - begin, 6))
            outcome = outcome if wish.dry_run else settle(systemd, outcome)
    except UnitError as error:
        outcome = Outcome.of_error(Verb.UPGRADE, unit, error)
    return replace(outcome, seconds=round(time.monotonic() - begin, 6))


def expand(
    names: Sequence[str], *, everything: bool = False, user: bool = False
) -> tuple[str, ...]:
    """The units that are named, patterns such as `web@*` replaced by those that serve and use the
    library, in order.

    With `everything` instead, all that use the library and serve, or have something parked. Raises
    NoSuchUnit for a name that is of none, NoMatchingUnit for such a pattern, and UnitError if PID 1
    cannot be asked.
    """
    if len(names) == 1 and not _PATTERN.intersection(names[0]):
        return tuple(names)  # `upgrade` itself says what is wrong with it
    found: dict[str, None] = {}
    with Systemd(user=user) as systemd:
        if everything:
            known = overview.read_all(systemd)
            return tuple(each.unit for each in known if each.serves or each.parked)
        for name in names:
            if not _PATTERN.intersection(name):
                found[systemd.unit(name).id] = None
                continue
            pattern = name if name.endswith(".service") else f"{name}.service"
            matching = systemd.running(pattern)
            if not matching:
                raise NoMatchingUnit(name)
            found.update(dict.fromkeys(_ours(systemd, matching) or matching))
    return tuple(found)


def _ours(systemd: Systemd, names: Sequence[str]) -> list[str]:
    """Those units that use the library: `*` is meant for no others."""
    found = []
    for name in names:
        with contextlib.suppress(NoSuchUnit):  # it has ended, and was forgotten
            unit = systemd.unit(name)
            if unit.fd_store_max and look(systemd, unit).ours:
                found.append(name)
    return found


def _upgrade(systemd: Systemd, name: str, wish: Wish, progress: Tell, begin: float) -> Outcome:
    unit = systemd.unit(name)
    if held := hold.by_admin(unit.id, user=systemd.user):
        remedy = f"when that is over: upgrader unhold {unit.id}"
        return Outcome.failed(Verb.UPGRADE, unit.id, Result.HELD, str(held), remedy)
    if unit.job_id:
        if job := systemd.job(unit):
            if wish.dry_run or not wish.wait:
                raise JobConflict(unit.id, _holder(unit, job))
            if (followed := _follow(systemd, unit, job, wish.timeout, progress)) is not None:
                return followed
        unit = systemd.unit(name)  # the job has ended, and changed it
    if is_kept(systemd, unit):
        if wish.dry_run:
            done = "would be started, with what systemd holds for it"
            return Outcome.done(Verb.UPGRADE, unit.id, done, changed=True)
        return start_again(systemd, unit, wish.timeout, progress)
    found = look(systemd, unit)
    if found.error and found.denied:
        return _denied(unit, Obstacle(found.error.message, found.error.remedy))
    root = may_steer(systemd)
    before = instance_client.status(found.said) if found.said else None
    obstacle = not_running(systemd, unit) or not_ours(unit, found)
    outdated = unit.need_daemon_reload  # so what runs has other settings, however new it is
    if obstacle is None and outdated and not wish.dry_run:
        progress(f"{unit.id}: its unit file changed on disk: systemctl daemon-reload")
        if not may_reload_files(systemd, unit):
            return Outcome.failed(
                Verb.UPGRADE, unit.id, Result.OUTDATED,
                "its unit file has changed on disk, and you may not have systemd read it",
                "as root: systemctl daemon-reload; then try again", before=before,
            )  # fmt: skip
        unit = systemd.unit(name)
    obstacle = obstacle or settings(unit)
    if obstacle is not None:
        return _nothing_done(unit, before, obstacle)
    if before and not wish.dry_run and not outdated and _is_newer(unit, before, wish.asked or 0.0):
        by = "a restart" if before.origin is Origin.RESTART else "another upgrade"
        done = f"{by} came first, after this was asked for, and has upgraded it: {before}"
        return Outcome.done(Verb.UPGRADE, unit.id, done, after=before)
    if wish.if_changed and not outdated and not any(changes(systemd, unit, found.said)):
        done = f"nothing has changed since it was started: {before}"
        return Outcome.done(Verb.UPGRADE, unit.id, done, before=before, after=before)
    mode = wish.mode or _usual_mode(found.said)
    if not root and (
        not_allowed := for_root_only(mode, found.said, preflight=bool(wish.preflight))
    ):
        return _denied(unit, not_allowed)
    tries = wish.preflight
    if tries is None:
        tries = root and found.said is not None and found.said.preflight_first
    warnings: tuple[str, ...] = ()
    forbidden = limits(systemd, unit, found) if tries or mode in (Mode.AUTO, Mode.LIVE) else ()
    if tries and forbidden:
        warnings = (f"no preflight, which is a part of a live upgrade: {forbidden[0]}",)
        tries = False
    if mode in (Mode.AUTO, Mode.LIVE):
        if forbidden:
            first = forbidden[0]
            if mode is Mode.LIVE:
                return _nothing_done(unit, before, Obstacle(first.cause, first.remedy))
            warnings += (f"not live but by a restart: {first}",)
        mode = Mode.RESTART if forbidden else Mode.LIVE
    if not root and mode is Mode.RESTART is not wish.mode:
        return _denied(unit, restart_by_name(unit, *warnings))
    if not root and mode is Mode.LIVE and not any(changes(systemd, unit, found.said)):
        # A reload that nobody has announced is an upgrade only if something has changed.
        done = f"nothing has changed since it was started: {before}"
        return Outcome.done(Verb.UPGRADE, unit.id, done, before=before, after=before)
    if mode is not Mode.LIVE:
        warnings += kept_only_while(systemd, unit)
    elif found.said and (stale := stale_credentials(systemd, unit, found.said)):
        warnings += (show_stale(unit.id, stale),)
    if wish.dry_run and mode is Mode.RESTART:
        warnings += draining(unit, user=systemd.user)
    for warning in warnings:
        progress(f"{unit.id}: warning: {warning}")
    runs = before or "an instance that cannot be asked"
    if wish.dry_run:
        reload_first = ", after a daemon-reload" if unit.need_daemon_reload else ""
        tried_first = ", after a preflight" if tries else ""
        done = f"would be upgraded in mode {mode}{reload_first}{tried_first}; it runs {runs}"
        return Outcome.done(
            Verb.UPGRADE, unit.id, done, warnings=warnings, before=before, changed=True
        )
    progress(f"{unit.id}: runs {runs}")
    attempt = Attempt(
        systemd, unit, found.said, mode, uuid.uuid4().hex if root else "", wish.timeout, progress,
        begun=begin, output=OutputFiles.of(unit.main_pid),
    )  # fmt: skip
    outcome = _try_first(attempt) if tries else None
    if outcome is None and mode is Mode.EXEC:
        outcome = execute(attempt, wish.command)
    elif outcome is None:
        outcome = reload(attempt) if mode is Mode.LIVE else restart(attempt)
    return replace(outcome, warnings=warnings + outcome.warnings)


def _try_first(attempt: Attempt) -> Outcome | None:
    """The preflight before an upgrade: a failure, or None if the new version would take over."""
    attempt = replace(attempt, id=uuid.uuid4().hex)
    attempt.say("preflight: the version on disk loads everything, and goes again")
    verdict = preflight(attempt)
    if not (why := objection(attempt, verdict)):
        attempt.say(f"preflight passed in {attempt.took}: the version on disk would take over")
        return None
    result = Result.OLD_SERVES if verdict.now.serves else Result.NOT_SERVING
    return attempt.failed(
        result,
        f"preflight: the version on disk would not take over: {why}",
        "put a good version in place",
        code=verdict.code,
        bad_version=verdict.code.suspects_version,
    )


def _is_newer(unit: Unit, status: Status, asked: float) -> bool:
    """Whether its main process was started by an upgrade, and after this one was asked for."""
    if status.origin not in (Origin.LIVE, Origin.RESTART):
        return False
    try:
        return process_started(unit.main_pid) > asked
    except OSError:
        return False


def _usual_mode(said: Description | None) -> Mode:
    """What the parameter `mode` of the running instance says."""
    text = said.parameters.get("mode", "") if said else ""
    return Mode(text) if text in list(Mode) else Mode.AUTO


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
    return f"a {job.kind} job (id {job.id}) has been running for {show_duration(age)}{by}"


def _follow(
    systemd: Systemd, unit: Unit, job: Job, timeout: float | None, progress: Tell
) -> Outcome | None:
    """What becomes of a job that somebody else has asked for; None if it has just ended."""
    waits = {"reload": (Mode.LIVE, await_reload), "restart": (Mode.RESTART, await_restart)}
    if job.kind not in waits:
        raise JobConflict(unit.id, _holder(unit, job))
    mode, wait = waits[job.kind]
    said = look(systemd, unit).said if mode is Mode.LIVE else None
    systemd.watch(unit)
    if systemd.job(systemd.unit(unit.id)) is None:
        return None
    progress(f"{unit.id}: follows what is under way: {_holder(unit, job)}")
    begun = said is not None and said.last.decision is Decision.NONE
    name = said.last.id if said and begun else said.upgrade if said else ""
    since = unit.state_change_usec
    return wait(Attempt(systemd, unit, said, mode, name, timeout, progress, since), job.id)


def settle(systemd: Systemd, outcome: Outcome) -> Outcome:
    """The outcome, after it was counted, and a hold put on the unit or lifted.

    Who is not root leaves that to whoever reads a hold: it is over if a newer instance serves, and the
    one that has refused a version says so.
    """
    user, root = systemd.user, may_steer(systemd)
    # One that was cancelled is neither a success nor a failure.
    if outcome.mode is not None and outcome.code is not Code.CANCELLED and not user:
        counts.add(outcome.unit, outcome.as_migration())
    try:
        if outcome.result is Result.DONE:
            if root:
                hold.lift(outcome.unit, user=user)
        elif outcome.bad_version and (root or outcome.mode is not Mode.LIVE):
            failed = _fingerprint(systemd, outcome.unit)
            hold.place(Hold.now(outcome.unit, outcome.cause, failed), user=user)
    except HoldError as error:
        warning = str(error)
        if outcome.result is not Result.DONE:
            warning += "; until a good version is back, do not let anything restart it"
        remedy = "\n".join(filter(None, (outcome.remedy, f"warning: {warning}")))
        return replace(outcome, remedy=remedy, warnings=(*outcome.warnings, warning))
    return outcome


def _fingerprint(systemd: Systemd, name: str) -> str:
    """What lies on disk now, by the instance that serves on; empty if none can say."""
    with contextlib.suppress(UnitError):
        if said := look(systemd, systemd.unit(name), patient=False).said:
            return said.fingerprint
    return ""


def _denied(unit: Unit, obstacle: Obstacle) -> Outcome:
    return Outcome.failed(
        Verb.UPGRADE, unit.id, Result.NO_PERMISSION, obstacle.cause, obstacle.remedy
    )


def _nothing_done(unit: Unit, before: Status | None, obstacle: Obstacle) -> Outcome:
    result = Result.OLD_SERVES if unit.serves else Result.NOT_SERVING
    return Outcome.failed(
        Verb.UPGRADE, unit.id, result, obstacle.cause, obstacle.remedy, before=before
    )  # fmt: skip
