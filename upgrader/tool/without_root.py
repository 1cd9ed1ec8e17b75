# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a user who is not root may have done to a unit of the system: what polkit allows to the user.

PID 1 asks polkit about each job. The instance takes no orders of such a user, and tells what everybody
may know: so nothing is announced to it, and a restart, which a user could get by asking for something
else, has to be asked for by name.
"""

import os

from upgrader.protocol.parameters import Mode
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.unit import Unit
from upgrader.tool.blockers import Obstacle
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import AccessDenied

_ROOT = "run the command as root, with sudo for instance"


def may_steer(systemd: Systemd) -> bool:
    """Whether an instance takes orders of this user: root, or the owner of the service manager."""
    return systemd.user or os.geteuid() == 0


def for_root_only(mode: Mode, said: Description | None, *, preflight: bool) -> Obstacle | None:
    """What of a wish the instance itself would have to know of; `said`: what it says."""
    if mode is Mode.EXEC:
        return Obstacle("mode exec is for root only", _ROOT)
    if preflight:
        return Obstacle("a preflight is for root only", _ROOT)
    deaf = said is not None and said.can is not None and "bus" not in said.can
    if mode is Mode.RESTART and deaf:
        return Obstacle(
            "its instance cannot ask systemd, so a restart that root does not announce is a stop"
            " to it",
            _ROOT,
        )
    return None


def restart_by_name(unit: Unit, why: str = "its parameter mode says so") -> Obstacle:
    """The obstacle that only a restart would do, and nobody has asked for one."""
    return Obstacle(
        f"it would be a restart, which only root gets without asking for one ({why})",
        f"if you want one: upgrader upgrade {unit.id} --mode restart",
    )


def may_reload_files(systemd: Systemd, unit: Unit) -> bool:
    """Have PID 1 read unit files anew, if this user may; False if not."""
    try:
        systemd.daemon_reload(unit.id)
    except AccessDenied:
        return False
    return True
