# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `check` finds: one thing about one unit, what it means for an upgrade, and its remedy."""

from dataclasses import dataclass
from enum import StrEnum

from upgrader.systemd.unit import Unit


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

    @classmethod
    def to_set(cls, severity: Severity, unit: Unit, what: str, setting: str) -> "Finding":
        """One that a line for [Service] would mend."""
        return cls(severity, what, edit(unit, setting), setting)


def edit(unit: Unit, setting: str) -> str:
    """How an admin sets it."""
    return f"systemctl edit {unit.id}, and below [Service] write {setting}"
