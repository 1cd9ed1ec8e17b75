# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say that a program below a runner goes on in a file that a package has replaced, and what to do."""

from upgrader.protocol.varlink_types import Description
from upgrader.tool.hold import HoldKind


def show_deleted(unit: str, said: Description, hold: HoldKind | None) -> str:
    """One line for people on the program that serves; empty if its file is the one on disk.

    `hold`: the kind of that of the unit, if there is one.
    """
    for each in said.programs:
        if each.deleted and not each.replaced:
            old = f"process {each.pid} goes on in the old {each.deleted}, which is deleted on disk"
            if hold is HoldKind.FAILED:
                return (
                    f"{old}, because its upgrade failed; install one that can go on with it, then:"
                    f" upgrader upgrade {unit}; or stop and start the unit, and it begins anew"
                )
            first = f"upgrader unhold {unit}; " if hold else ""
            return f"{old}; next: {first}upgrader upgrade {unit}"
    return ""
