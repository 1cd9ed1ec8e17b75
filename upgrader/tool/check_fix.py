# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write what `check` has found missing into a drop-in of the unit, for the next start."""

import os
from collections.abc import Sequence
from pathlib import Path

from upgrader.tool.check import CheckReport
from upgrader.tool.systemd_client import Systemd


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
