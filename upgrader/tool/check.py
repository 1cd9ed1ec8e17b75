# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say whether a unit can be upgraded, and how: every blocker and warning with its remedy."""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from upgrader import __version__
from upgrader.protocol.parameters import Mode
from upgrader.protocol.systemd_syntax import show_span, time_span
from upgrader.protocol.varlink_types import Description
from upgrader.protocol.wording import counted, show_bytes, show_duration
from upgrader.systemd.live_limits import live_limits
from upgrader.systemd.unit import UNSET, Unit, as_text
from upgrader.tool import hold, instance_client, unit_processes
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import all_settings, not_ours, not_running
from upgrader.tool.check_runner import about_runner
from upgrader.tool.check_settings import about_settings
from upgrader.tool.credentials import show_stale, stale_credentials
from upgrader.tool.finding import Finding, Severity, edit
from upgrader.tool.listening_sockets import inodes, listening, processes
from upgrader.tool.live_mode import limits
from upgrader.tool.outcome import ExitCode
from upgrader.tool.preflight import objection
from upgrader.tool.preflight import preflight as try_out
from upgrader.tool.presence import Presence, look, says_so
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_sockets import CONTROL

#: Programs that start another one, and wait for its end.
_STARTERS = {"uv", "uvx", "conda", "mamba", "micromamba"}
_NAMED = 5  # modules that are named one by one


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All that was found about one unit; `mode` is the best that it can be upgraded in."""

    unit: str
    serves: bool
    findings: tuple[Finding, ...]
    preflight: bool = False  #: the version on disk has loaded everything
    ours: bool = True  #: its program uses the library, or its unit says that it is going to

    @property
    def mode(self) -> str:
        """live, restart, or none."""
        worst = {finding.severity for finding in self.findings}
        if Severity.BLOCKER in worst:
            return "none"
        return "restart" if Severity.RESTART_ONLY in worst else "live"

    @property
    def exit_code(self) -> ExitCode:
        """0 if it can be upgraded live."""
        if not self.serves:
            return ExitCode.NOT_SERVING
        return ExitCode.DONE if self.mode == "live" else ExitCode.FAILED

    @property
    def line(self) -> str:
        """The result in one line."""
        words = {
            "live": "can be upgraded live",
            "restart": "can be upgraded by a restart, but not live",
            "none": "cannot be upgraded",
        }
        warnings = sum(1 for each in self.findings if each.severity is Severity.WARNING)
        more = f", {counted(warnings, 'warning')}" if warnings else ""
        loads = "; the version on disk has loaded everything" if self.preflight else ""
        return f"{self.unit}: {words[self.mode]}{more}{loads}"

    def json(self) -> bytes:
        """One object: the fields, `mode`, `line` and `exit_code`."""
        return msgspec.json.encode(
            {
                **msgspec.to_builtins(self),
                "mode": self.mode,
                "line": self.line,
                "exit_code": int(self.exit_code),
            }
        )

    @property
    def settings(self) -> tuple[str, ...]:
        """The lines for [Service] that would mend what lines can mend, each once."""
        return tuple(dict.fromkeys(each.setting for each in self.findings if each.setting))


def check(
    systemd: Systemd, name: str, *, preflight: bool = False, force: bool = False
) -> CheckReport:
    """Look at one unit; raises UnitError if PID 1 cannot be asked about it.

    `preflight`: start the version on disk as well, and see whether it would take over. Of a unit that
    does not use the library nothing else is said; with `force`, as if it did.
    """
    unit = systemd.unit(name)
    present = look(systemd, unit)
    ours = force or present.ours or says_so(unit)
    findings = tuple(_findings(systemd, unit, present, ours))
    report = CheckReport(unit.id, unit.serves, findings, ours=ours)
    if not preflight or not unit.serves:
        return report
    if report.mode != "live":
        what = "the new version was not started: a preflight is part of a live upgrade"
        return replace(report, findings=(*report.findings, Finding(Severity.WARNING, what)))
    attempt = Attempt(
        systemd, unit, present.said, Mode.LIVE, uuid.uuid4().hex, None, lambda text: None
    )  # fmt: skip
    if why := objection(attempt, try_out(attempt)):
        what = f"the version on disk would not take over: {why}"
        found = Finding(Severity.BLOCKER, what, "put a good version in place")
        return replace(report, findings=(*report.findings, found))
    return replace(report, preflight=True)


def _findings(systemd: Systemd, unit: Unit, present: Presence, ours: bool) -> Iterator[Finding]:
    if obstacle := not_running(systemd, unit) or not_ours(unit, present):
        yield Finding(Severity.BLOCKER, obstacle.cause, obstacle.remedy)
    if not ours:
        return
    if not present.said and unit.exec_start:
        yield from _about_command(unit, unit.exec_start[-1].path)
    for obstacle in all_settings(unit):
        yield Finding(Severity.BLOCKER, obstacle.cause, obstacle.remedy, obstacle.setting)
    for limit in limits(systemd, unit, present) if unit.serves else live_limits(unit):
        setting = limit.setting
        if setting.startswith("ExecReload="):
            setting = f"ExecReload={_python(unit)} -m upgrader.takeover"
        yield Finding(Severity.RESTART_ONLY, limit.cause, limit.remedy, setting)
    if unit.need_daemon_reload:
        yield Finding(
            Severity.WARNING,
            "its unit file has changed on disk, and systemd has not read it",
            "systemctl daemon-reload, then check again; an upgrade reads it by itself",
        )
    values = systemd.properties(unit)
    programs = present.said.programs if present.said else ()
    may_end = any(each.may_end for each in programs)
    yield from about_settings(systemd, unit, values, may_end=may_end)
    if held := hold.standing(unit, present.said, user=systemd.user):
        remedies = {
            hold.HoldKind.ADMIN: f"when that is over: upgrader unhold {unit.id}",
            hold.HoldKind.FAILED: "put a good version in place and upgrade",
        }
        yield Finding(
            Severity.WARNING, f"it is on hold: hooks leave it alone ({held})", remedies[held.kind]
        )
    if unit.serves and present.said and present.said.partial:
        yield Finding(
            Severity.WARNING,
            "its instance tells all of it to root only: modules, states and sockets were not looked at",
            "run the command as root, with sudo for instance",
        )
    elif unit.serves and present.said:
        yield from _about_instance(unit, present.said, values)
        if stale := stale_credentials(systemd, unit, present.said):
            what, _, remedy = show_stale(unit.id, stale).partition("; ")
            yield Finding(Severity.WARNING, what, remedy)
        yield from _about_states(systemd, unit, present.said)
        draining = instance_client.describe_draining(unit, user=systemd.user)
        group = as_text(values.get("ControlGroup", ""))
        if present.said.programs:
            others = (os.getpid(), unit.control_pid, *(each.pid for each in draining))
            pids = systemd.processes(unit)
            yield from about_runner(unit, present.said, values, pids, others, _python(unit))
        else:
            yield from _about_processes(unit, present.said, draining, group)


def _about_command(unit: Unit, path: str) -> Iterator[Finding]:
    """Only the main process can be an instance."""
    name = os.path.basename(path)
    if name in _STARTERS:
        yield Finding(
            Severity.BLOCKER,
            f"ExecStart= runs {name}, which starts the program as another process: the main process"
            " has to be the program itself",
            edit(unit, "ExecStart= with the python of its environment, such as .venv/bin/python"),
        )


def _about_instance(
    unit: Unit, instance: Description, values: Mapping[str, Any]
) -> Iterator[Finding]:
    """What the instance says of itself."""

    if instance.library != __version__:
        yield Finding(
            Severity.WARNING,
            f"it runs upgrader {instance.library}, and this command is of {__version__}",
            "the next upgrade of the service brings them together",
        )
    if instance.can is not None and "journal" not in instance.can:
        yield Finding(
            Severity.WARNING,
            "it cannot write to the journal: what its upgrades say of themselves is in its log, and"
            " not in upgrader history",
            "let it reach /run/systemd/journal/socket",
        )
    if instance.late and not instance.programs:
        named = ", ".join(instance.late[:_NAMED])
        more = f" and {len(instance.late) - _NAMED} more" if len(instance.late) > _NAMED else ""
        yield Finding(
            Severity.WARNING,
            f"modules were imported after it was ready: {named}{more}; with a new version on disk,"
            " old and new code would be mixed",
            "import them before serve()",
        )
    drain = 0.0
    with contextlib.suppress(ValueError):  # it may say anything
        drain = time_span(instance.parameters.get("drain-timeout", "0"))
    if drain >= unit.timeout_stop_usec / 1e6:
        yield Finding(
            Severity.WARNING,
            f"drain-timeout={instance.parameters['drain-timeout']} is not below TimeoutStopSec="
            f"{show_span(unit.timeout_stop_usec / 1e6)}: a stop cuts what it drains",
            edit(unit, "TimeoutStopSec=SPAN, longer than the other"),
        )
    limit = int(values.get("LimitNOFILE", UNSET))
    if 2 * instance.connections + 64 > limit:
        yield Finding(
            Severity.WARNING,
            f"LimitNOFILE={limit} is little for {counted(instance.connections, 'connection')}: on their way"
            " they count twice, for all services of its user",
            edit(unit, f"LimitNOFILE={4 * instance.connections}"),
        )


def _about_states(systemd: Systemd, unit: Unit, instance: Description) -> Iterator[Finding]:
    """States that cannot be saved as they are now, or take too long."""
    trials = instance.trials
    with contextlib.suppress(instance_client.InstanceError):  # then as of the last time
        trials = instance_client.try_states(unit, user=systemd.user)
    for trial in trials:
        if trial.problem:
            yield Finding(
                Severity.BLOCKER,
                f"state {trial.name!r} cannot be saved: {trial.problem}",
                "keep what cannot be saved out of the state; a restart now would begin without it",
            )
        elif trial.unreadable:
            yield Finding(
                Severity.WARNING,
                f"state {trial.name!r} could not be loaded again by the version that runs:"
                f" {trial.unreadable}",
                "annotate the field with what it holds, in a new version of the state, and upgrade to that"
                " live",
            )
        elif trial.altered:
            yield Finding(
                Severity.WARNING,
                f"state {trial.name!r} would not be loaded as it is: {', '.join(trial.altered)}",
                "annotate fields with what they hold",
            )
    limit = 0.0
    with contextlib.suppress(ValueError):  # it may say anything
        limit = time_span(instance.parameters.get("downtime-limit", "0"))
    seconds = sum(trial.seconds for trial in trials)
    if seconds > limit > 0:
        size = sum(trial.bytes for trial in trials)
        yield Finding(
            Severity.WARNING,
            f"saving its states, {show_bytes(size)}, takes {show_duration(seconds)}: longer than"
            f" downtime-limit={instance.parameters['downtime-limit']}, so a live upgrade gives up",
            f"upgrader set {unit.id} downtime-limit=SPAN, or keep less in the states",
        )


def _about_processes(
    unit: Unit, instance: Description, draining: Sequence[Description], group: str
) -> Iterator[Finding]:
    """Sockets that the instance has and did not declare; processes that it should not have."""
    declared = {each.inode for each in instance.backends}
    declared |= {inode for each in instance.backends for inode in each.inodes}
    try:
        own, there = inodes(unit.main_pid), listening(unit.main_pid)
    except OSError:
        yield Finding(
            Severity.WARNING,
            "this user may not look at its sockets: those not declared are not found",
            "run the command as root, with sudo for instance",
        )
        return
    for inode in sorted(own & there.keys() - declared):
        found = there[inode]
        if CONTROL.search(found.address):
            continue
        yield Finding(
            Severity.WARNING,
            f"it listens on {found} and has not declared that: a new instance beside it could not"
            " bind the same, and the upgrade would fail",
            "declare it with instance.listener() or datagrams(), or open it after the upgrade, in a"
            " task given to serve()",
        )
    yield from _about_children(unit, draining, group)
    for pid in processes(group):
        if pid in (unit.main_pid, os.getpid()):
            continue
        try:
            shared = inodes(pid) & declared
        except OSError:
            continue
        if shared:
            yield Finding(
                Severity.WARNING,
                f"process {pid} has its listeners too: one instance is one process",
                "use template units (web@1, web@2) on one .socket instead of forking",
            )


def _about_children(unit: Unit, draining: Sequence[Description], group: str) -> Iterator[Finding]:
    """Processes beside the instance, which an upgrade ends, or nobody."""
    if children := unit_processes.started_by(unit.main_pid, processes(group)):
        yield Finding(
            Severity.WARNING,
            "an upgrade ends what the instance has started, by SIGTERM:"
            f" {unit_processes.named(children)}",
            "have the new version start its own; instance.keep() of a pidfd spares a process",
        )
    others = (unit.control_pid, *(each.pid for each in draining))
    if strays := unit_processes.strays(unit.main_pid, others, processes(group)):
        yield Finding(
            Severity.WARNING,
            "no upgrade ends what nobody looks after any more in this unit:"
            f" {unit_processes.named(strays)}",
            "start it in a unit of its own (systemd-run), or keep its parent running",
        )


def _python(unit: Unit) -> str:
    """The interpreter that the service runs under, which has the library."""
    path = unit.exec_start[-1].path if unit.exec_start else ""
    return path if "python" in os.path.basename(path) else sys.executable
