# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live mode: one unit reloaded into its new version through PID 1, and judged.

The reload is takeover's; neither its exit code nor what it says is believed.
"""

from dataclasses import replace

from upgrader.codes import Code
from upgrader.protocol.parameters import FD_STORE_ONLY, MECHANISM, Mechanism
from upgrader.protocol.phase import Decision
from upgrader.protocol.status_text import Origin
from upgrader.protocol.wording import show_duration
from upgrader.systemd.live_limits import (
    DYNAMIC_USERS,
    RESTART,
    Limit,
    LimitKind,
    Running,
    live_limits,
)
from upgrader.systemd.unit import Unit
from upgrader.tool import failure_cause, instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import tries_again, what_to_do
from upgrader.tool.course import Course, show_times
from upgrader.tool.instance_client import InstanceError
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.presence import Presence
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError, WaitTimeout
from upgrader.tool.verdict import Verdict, decide

#: Where everything crossed; the others lost at least the connections.
_KEPT = (Origin.LIVE, Origin.RESTART)

_MOVED = "RuntimeDirectory= has changed since it was started, and its socket is in the old one"
_DEAF = "its instance cannot ask systemd, which a live upgrade has to"
_REACH = (
    "let it reach /run/dbus/system_bus_socket (InaccessiblePaths=, RootDirectory= and the like), or"
    " upgrader restart {unit}; with the bus hidden, systemctl restart is the same as a stop"
)


def limits(systemd: Systemd, unit: Unit, found: Presence) -> tuple[Limit, ...]:
    """What forbids to upgrade this unit live, first what to mend first."""
    if found.said is None:
        error = found.error or InstanceError("its instance cannot be asked")
        silent = [Limit(LimitKind.INSTANCE, error.message, error.remedy)] if found.ours else []
        return (*live_limits(unit), *turned_away(systemd, unit), *silent)
    if instance_client.has_moved(unit, user=systemd.user):
        remedy = RESTART.format(unit=unit.id)
        return (Limit(LimitKind.RUNTIME_DIRECTORY, _MOVED, remedy),)
    given = found.said.started
    passed = None if given.activated is None else tuple(given.activated)
    running = Running(passed, tuple(given.credentials), given.memory, given.cache)
    forbidden = live_limits(unit, running, systemd.sockets(unit)) or turned_away(systemd, unit)
    if not forbidden and found.said.can is not None and "bus" not in found.said.can:
        return (Limit(LimitKind.BUS, _DEAF, _REACH.format(unit=unit.id)),)
    if not forbidden and found.said.parameters.get(MECHANISM) == Mechanism.FD_STORE:
        return (Limit(LimitKind.INSTANCE, FD_STORE_ONLY, RESTART.format(unit=unit.id)),)
    return forbidden


def turned_away(systemd: Systemd, unit: Unit) -> tuple[Limit, ...]:
    """Whether PID 1 cannot be asked from inside the unit, as takeover and runners do. Takeover asks PID 1 as the user of the service, and dbus-daemon takes no connection of a user
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


def reload(attempt: Attempt) -> Outcome:
    """Upgrade one unit live and wait for the outcome; raises UnitError only if nothing was done.

    Without an id it is a reload that nobody has announced, which upgrades if something has changed.
    """
    systemd, unit = attempt.systemd, attempt.unit
    for line in unit.further_reloads:
        attempt.say(f"the reload also runs {line}")
    if attempt.id:
        # A reload with nothing changed is the author's own; this one is asked for.
        try:
            instance_client.expect(unit, attempt.id, user=systemd.user)
        except InstanceError as error:
            raise UnitError(unit.id, error.message, remedy=error.remedy) from error
    course = Course(attempt)
    job = systemd.reload(unit)
    course.queued()
    attempt.say(f"systemd reloads it (job {job})")
    outcome = replace(await_reload(attempt, job), times=course.times())
    if not attempt.id and outcome.code is Code.TAKEOVER_GONE:
        now = systemd.unit(unit.id)
        if now.serves and now.reload_result == "success":
            text = f"reloaded, and a start would make no other process: {outcome.after}"
            return Outcome.done(Verb.UPGRADE, unit.id, text, before=outcome.after)
    if outcome.times:
        attempt.say(show_times(outcome.times))
    return outcome


def await_reload(attempt: Attempt, job: int) -> Outcome:
    """Wait for the end of a reload job, and judge what became of the upgrade."""
    unit = attempt.unit
    try:
        _, now = attempt.follow(job, settled)
        return _judge(attempt, decide(attempt, now))
    except WaitTimeout as error:
        now = attempt.systemd.unit(unit.id)
        return attempt.failed(
            Result.UNDECIDED if now.serves else Result.NOT_SERVING,
            f"not done after {show_duration(error.seconds)} (--timeout), it is {now.active_state}",
            f"the reload goes on in systemd; see: systemctl status {unit.id}",
        )
    except UnitError as error:
        return attempt.lost(error)


def settled(unit: Unit) -> bool:
    """Whether no reload goes on: a job that is cancelled ends at once, what it has started does not."""
    return unit.settled and unit.active_state not in ("reloading", "refreshing")


def _judge(attempt: Attempt, verdict: Verdict) -> Outcome:
    now, see = verdict.now, f"see: journalctl -u {attempt.unit.id}"
    after = instance_client.status(verdict.main) if verdict.main else None
    if not now.serves:
        return _not_serving(attempt, now)
    if verdict.decision is Decision.ABORTED:
        return _refused(attempt, verdict)
    if after is None:
        who = f"process {now.main_pid}, the main one now, does not answer"
        if now.main_pid == attempt.unit.main_pid:
            who = "the running instance does not say, or has not decided"
            if attempt.before and attempt.before.interface == 1:
                who = f"unknown (library {attempt.before.library})"
        return attempt.failed(Result.UNDECIDED, who, see)
    if verdict.decision is Decision.NONE:
        cause = f"another instance was started, which does not go on from the one before: {after}"
        return attempt.failed(Result.WITHOUT_IMAGE, cause, see, after=after)
    if after.origin is Origin.UNKNOWN:
        return attempt.failed(Result.UNDECIDED, f"unknown (library {after.library})", see)
    if after.origin not in _KEPT:
        cause = f"the new version crashed after it had taken over: {after}"
        return attempt.failed(Result.WITHOUT_IMAGE, cause, see, after=after)
    done = f"upgraded in {attempt.took}"
    if after.origin is Origin.RESTART:
        done = "a restart came in between, and has upgraded it"
    return attempt.done(f"{done}: {after}", after, after.pause)


def _refused(attempt: Attempt, verdict: Verdict) -> Outcome:
    code = verdict.code
    if code is Code.CANCELLED:
        why, remedy = "it was cancelled, as somebody wanted", ""
    else:
        why = explain(attempt, verdict)
        remedy = f"see: journalctl -u {attempt.unit.id}"
    if code.suspects_version:
        remedy = f"put a good version in place; {remedy}"
    after = instance_client.status(attempt.before) if attempt.before else None
    return attempt.failed(
        Result.OLD_SERVES, why, remedy, code=code, bad_version=code.suspects_version, after=after
    )


def _not_serving(attempt: Attempt, now: Unit) -> Outcome:
    if now.active_state in ("inactive", "deactivating") and now.result == "success":
        interrupted = "the unit was stopped meanwhile"
    else:
        entries = failure_cause.read(attempt.unit, attempt.since, user=attempt.systemd.user)
        # If the source dies, systemd ends the new main process as well, which then parks and exits.
        if now.exec_main_pid != attempt.unit.main_pid and not failure_cause.ended_well(now):
            why, remedy = failure_cause.cause(entries, now).text, what_to_do(attempt.systemd, now)
            return attempt.failed(Result.NOT_SERVING, why, remedy, bad_version=True, now=now)
        interrupted = failure_cause.killed(entries) or failure_cause.ended(now)
    # What is parked for the next start may only be on its way.
    return attempt.failed(Result.NOT_SERVING, interrupted, _look(now), now=now)


def _look(now: Unit) -> str:
    if now.retries:
        return tries_again(now)
    return f"to start it: systemctl start {now.id}"


def explain(attempt: Attempt, verdict: Verdict) -> str:
    """Why the upgrade was aborted, as far as anybody says; the journal may know more."""
    unit, now = attempt.unit, verdict.now
    if now.reload_result == "timeout":
        span = f"{now.timeout_start_usec / 1e6:g}s"
        return f"the reload took longer than TimeoutStartSec={span}, and systemd ended it"
    entries = failure_cause.read(unit, attempt.since, user=attempt.systemd.user)
    if verdict.code is Code.TAKEOVER_GONE:
        if reported := failure_cause.reported(entries, attempt.id):
            return reported
        if now.reload_result in ("signal", "core-dump"):
            return "takeover, which ExecReload= runs, was killed"
        return verdict.reason or "the reload changed nothing"
    reason = verdict.reason or failure_cause.reported(entries, attempt.id) or "nobody said why"
    if verdict.code is Code.ENDED_EARLY:
        # Takeover reports it, by its standard error as well; a runner that of its program.
        told = {
            each.pid
            for each in entries
            if each.fields.get("UPGRADER_SIDE") in ("takeover", "destination")
        }
        written = attempt.output.lines()  # by the running instance and takeover as well
        if said := (
            failure_cause.last_words(entries, {now.main_pid, *told})
            or failure_cause.exception(written)
        ):
            return f"{reason}: {said}"
    return reason
