# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the settings of a unit that surprise in an upgrade, for `check`."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from upgrader.systemd.unit import UNSET, Unit, as_text
from upgrader.tool.blockers import kept_only_while
from upgrader.tool.finding import Finding, Severity, edit
from upgrader.tool.listening_sockets import processes
from upgrader.tool.systemd_client import Systemd

_LATE = ("ExecCondition", "ExecStartPre", "ExecStartPost")


def about_settings(
    systemd: Systemd, unit: Unit, values: Mapping[str, Any], *, may_end: bool
) -> Iterator[Finding]:
    """All that is worth a warning; `values`: the D-Bus properties of the unit; `may_end`: if its program
    ends without a failure, nobody wants it started again."""
    yield from _about_systemd(systemd, unit)
    yield from _about_reload(unit)
    yield from _about_processes(unit, values, may_end=may_end)


def _about_systemd(systemd: Systemd, unit: Unit) -> Iterator[Finding]:
    """What this release of systemd cannot do."""
    for what in kept_only_while(systemd, unit):
        if unit.fd_store_preserve is None:
            yield Finding(Severity.WARNING, what, "systemd 254 and later keep it")
        else:
            yield Finding.to_set(Severity.WARNING, unit, what, "FileDescriptorStorePreserve=yes")


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


def _about_processes(unit: Unit, values: Mapping[str, Any], *, may_end: bool) -> Iterator[Finding]:
    """Settings that do no harm to a restart, and surprise in a live upgrade."""
    for name in _LATE:
        if values.get(name):
            yield Finding(
                Severity.WARNING,
                f"{name}= is not run by a live upgrade, only by a start",
                "do what it does before the upgrade, or upgrade with --mode restart",
            )
    preserve = as_text(values.get("RuntimeDirectoryPreserve", "no"))
    if preserve == "no":
        what = "a restart removes the sockets in its RuntimeDirectory="
        yield Finding.to_set(Severity.WARNING, unit, what, "RuntimeDirectoryPreserve=restart")
    if unit.notify_access == "all":
        what = "NotifyAccess=all: whatever the service has started may speak to systemd for it"
        yield Finding.to_set(Severity.WARNING, unit, what, "NotifyAccess=exec")
    if unit.restart == "no":
        what = "Restart=no: after a crash nothing starts it again, and what it had is lost"
        yield Finding.to_set(Severity.WARNING, unit, what, "Restart=always")
    elif unit.restart not in ("always", "on-success") and not may_end:
        what = (
            f"Restart={unit.restart}: if the program ends by itself, and without a failure, nothing"
            " starts it again"
        )
        yield Finding.to_set(Severity.WARNING, unit, what, "Restart=always")
    yield from _about_output(unit, values)
    tasks = _tasks(as_text(values.get("ControlGroup", "")))
    most = int(values.get("TasksMax", UNSET))
    if most != UNSET and 2 * tasks > most:
        what = f"TasksMax={most} leaves no room for a second instance: it has {tasks} tasks"
        yield Finding.to_set(Severity.WARNING, unit, what, f"TasksMax={3 * tasks}")


def _about_output(unit: Unit, values: Mapping[str, Any]) -> Iterator[Finding]:
    """PID 1 opens the file anew for each process that it starts, so for takeover at each reload."""
    harm = {
        "truncate": "each reload empties that file",
        "file": "each reload writes over its begin",
    }
    for name in "StandardOutput", "StandardError":
        kind = as_text(values.get(name, "")).partition(":")[0]
        if kind in harm:
            yield Finding(
                Severity.WARNING,
                f"{name}={kind}: {harm[kind]}, as systemd opens it for ExecReload= too",
                edit(unit, f"{name}=append:PATH"),
            )


def _tasks(group: str) -> int:
    """How many tasks a cgroup has; PID 1 does not know it where the controller is missing."""
    count = 0
    for pid in processes(group):
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count
