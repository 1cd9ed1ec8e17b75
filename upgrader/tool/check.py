# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a unit can be upgraded, and how: every blocker and warning with its remedy; changes nothing.

What can be put right in the unit file is put there by `fix`, in a drop-in of its own.
"""

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from upgrader._version import VERSION
from upgrader.protocol.parameters import Mode
from upgrader.protocol.systemd_syntax import time_span
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.live_limits import live_limits
from upgrader.systemd.unit import Unit
from upgrader.tool import hold, instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import all_settings, kept_only_while, not_ours, not_running
from upgrader.tool.listening_sockets import inodes, listening, processes
from upgrader.tool.live_mode import limits
from upgrader.tool.outcome import ExitCode, duration
from upgrader.tool.preflight import objection
from upgrader.tool.preflight import preflight as try_out
from upgrader.tool.presence import Presence, look
from upgrader.tool.systemd_client import Systemd

_NAMED = 5  # modules that are named one by one
_LATE = ("ExecCondition", "ExecStartPre", "ExecStartPost")
_UNSET = 2**64 - 1
#: The sockets of the library itself, under the names at which they were bound.
_CONTROL = re.compile(r"/\.(upgrader|draining-\d+)\.sock\.\d+$")


class Severity(StrEnum):
    """What a finding means for an upgrade."""

    BLOCKER = "blocker"  #: there can be none
    RESTART_ONLY = "restart-only"  #: it can only be by a restart
    WARNING = "warning"  #: it may not go as wished


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing; `setting` is the line for [Service] that would mend it, if one would."""

    severity: Severity
    what: str
    remedy: str = ""
    setting: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All that was found about one unit; `mode` is the best that it can be upgraded in."""

    unit: str
    serves: bool
    findings: tuple[Finding, ...]
    preflight: bool = False  #: the version on disk has loaded everything

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
        more = f", {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
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


def check(systemd: Systemd, name: str, *, preflight: bool = False) -> CheckReport:
    """Look at one unit; raises UnitError if PID 1 cannot be asked about it.

    `preflight`: start the version on disk as well, and see whether it would take over.
    """
    unit = systemd.unit(name)
    present = look(systemd, unit)
    report = CheckReport(unit.id, unit.serves, tuple(_findings(systemd, unit, present)))
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


def _findings(systemd: Systemd, unit: Unit, present: Presence) -> Iterator[Finding]:
    if obstacle := not_running(systemd, unit) or not_ours(unit, present):
        yield Finding(Severity.BLOCKER, obstacle.cause, obstacle.remedy)
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
    yield from _about_systemd(systemd, unit)
    values = systemd.properties(unit)
    yield from _about_reload(unit)
    yield from _about_settings(unit, values)
    if held := hold.standing(unit, present.said, user=systemd.user):
        remedies = {
            hold.HoldKind.ADMIN: f"when that is over: upgrader unhold {unit.id}",
            hold.HoldKind.FAILED: "put a good version in place and upgrade",
        }
        yield Finding(
            Severity.WARNING, f"it is on hold: hooks leave it alone ({held})", remedies[held.kind]
        )
    if unit.serves and present.said:
        yield from _about_instance(unit, present.said, values)
        yield from _about_states(systemd, unit, present.said)
        yield from _about_processes(unit, present.said, _text(values.get("ControlGroup", "")))


def _about_systemd(systemd: Systemd, unit: Unit) -> Iterator[Finding]:
    """What this release of systemd cannot do."""
    for what in kept_only_while(systemd, unit):
        if unit.fd_store_preserve is None:
            yield Finding(Severity.WARNING, what, "systemd 254 and later keep it")
        else:
            setting = "FileDescriptorStorePreserve=yes"
            yield Finding(Severity.WARNING, what, _edit(unit, setting), setting)


def _about_reload(unit: Unit) -> Iterator[Finding]:
    """What else a reload runs where takeover does."""
    if len(unit.further_reloads) == len(unit.exec_reload):
        return
    for line in unit.further_reloads:
        yield Finding(
            Severity.WARNING,
            f"ExecReload= also runs {line}, at each upgrade too; if it fails, so does the reload",
            "leave the line out: takeover has the instance reload if nothing has changed",
        )


def _about_settings(unit: Unit, values: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings that do no harm to a restart, and surprise in a live upgrade."""
    for name in _LATE:
        if values.get(name):
            yield Finding(
                Severity.WARNING,
                f"{name}= is not run by a live upgrade, only by a start",
                "do what it does before the upgrade, or upgrade with --mode restart",
            )
    preserve = _text(values.get("RuntimeDirectoryPreserve", "no"))
    if preserve == "no":
        setting = "RuntimeDirectoryPreserve=restart"
        what = "a restart removes the sockets in its RuntimeDirectory="
        yield Finding(Severity.WARNING, what, _edit(unit, setting), setting)
    if unit.notify_access == "all":
        setting = "NotifyAccess=exec"
        what = "NotifyAccess=all: whatever the service has started may speak to systemd for it"
        yield Finding(Severity.WARNING, what, _edit(unit, setting), setting)
    if unit.restart == "no":
        what = "Restart=no: after a crash nothing starts it again, and what it had is lost"
        yield Finding(Severity.WARNING, what, _edit(unit, "Restart=always"), "Restart=always")
    tasks, most = _tasks(_text(values.get("ControlGroup", ""))), int(values.get("TasksMax", _UNSET))
    if most != _UNSET and 2 * tasks > most:
        yield Finding(
            Severity.WARNING,
            f"TasksMax={most} leaves no room for a second instance: it has {tasks} tasks",
            _edit(unit, f"TasksMax={3 * tasks}"),
            f"TasksMax={3 * tasks}",
        )


def _about_instance(
    unit: Unit, instance: Description, values: Mapping[str, Any]
) -> Iterator[Finding]:
    """What the instance says of itself."""

    if instance.library != VERSION:
        yield Finding(
            Severity.WARNING,
            f"it runs upgrader {instance.library}, and this command is of {VERSION}",
            "the next upgrade of the service brings them together",
        )
    if instance.late:
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
            f"{unit.timeout_stop_usec / 1e6:g}s: a stop cuts what it drains",
            _edit(unit, "TimeoutStopSec=SPAN, longer than the other"),
        )
    limit = int(values.get("LimitNOFILE", _UNSET))
    if 2 * instance.connections + 64 > limit:
        yield Finding(
            Severity.WARNING,
            f"LimitNOFILE={limit} is little for {instance.connections} connections: on their way"
            " they count twice, for all services of its user",
            _edit(unit, f"LimitNOFILE={4 * instance.connections}"),
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
    limit = 0.0
    with contextlib.suppress(ValueError):  # it may say anything
        limit = time_span(instance.parameters.get("downtime-limit", "0"))
    seconds = sum(trial.seconds for trial in trials)
    if seconds > limit > 0:
        size = sum(trial.bytes for trial in trials)
        yield Finding(
            Severity.WARNING,
            f"saving its states, {size} bytes, takes {duration(seconds)}: longer than"
            f" downtime-limit={instance.parameters['downtime-limit']}, so a live upgrade gives up",
            f"upgrader set {unit.id} downtime-limit=SPAN, or keep less in the states",
        )


def _about_processes(unit: Unit, instance: Description, group: str) -> Iterator[Finding]:
    """Sockets that the instance has and did not declare; processes that it should not have."""
    declared = {each.inode for each in instance.backends}
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
        if _CONTROL.search(found.address):
            continue
        yield Finding(
            Severity.WARNING,
            f"it listens on {found} and has not declared that: a new instance beside it could not"
            " bind the same, and the upgrade would fail",
            "declare it with instance.listener() or datagrams(), or open it after the upgrade, in a"
            " task given to serve()",
        )
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


def _tasks(group: str) -> int:
    """How many tasks a cgroup has; PID 1 does not know it where the controller is missing."""
    count = 0
    for pid in processes(group):
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _python(unit: Unit) -> str:
    """The interpreter that the service runs under, which has the library."""
    path = unit.exec_start[-1].path if unit.exec_start else ""
    return path if "python" in os.path.basename(path) else sys.executable


def _edit(unit: Unit, setting: str) -> str:
    return f"systemctl edit {unit.id}, and below [Service] write {setting}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# Mending


def drop_in(unit: str, *, user: bool = False) -> Path:
    """Where `fix` writes."""
    if not user:
        return Path(f"/etc/systemd/system/{unit}.d/50-upgrader.conf")
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, f"systemd/user/{unit}.d/50-upgrader.conf")


def fixed(report: CheckReport, before: str, existing_reload: Sequence[object] = ()) -> str:
    """The drop-in with all that is missing, given what it holds now; lines by hand stay."""
    lines = before.splitlines() or [
        "# Written by `upgrader check --fix`: what live upgrades of this service need.",
        "[Service]",
    ]
    for setting in report.settings:
        name = setting.partition("=")[0] + "="
        lines = [line for line in lines if not line.startswith(name)]
        if name == "ExecReload=" and existing_reload:
            lines.append(
                "# Replaces what the unit ran: instance.reload() declares what to do then."
            )
            lines.append(name)
        lines.append(setting)
    return "\n".join(lines) + "\n"


def fix(systemd: Systemd, report: CheckReport) -> tuple[Path, str]:
    """Write the drop-in, and have PID 1 read it; returns where and what. Raises OSError, UnitError."""
    path = drop_in(report.unit, user=systemd.user)
    before = path.read_text() if path.exists() else ""
    text = fixed(report, before, systemd.unit(report.unit).exec_reload)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Written beside and renamed: PID 1 never reads half of it.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    systemd.daemon_reload(report.unit)
    return path, text
