# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who calls an instance, and may do what: root, and takeover, which PID 1 knows."""

import contextlib
import os
import re

from upgrader.errors import BusError
from upgrader.instance.control_listener import Caller
from upgrader.protocol.varlink import denied, refused
from upgrader.systemd.bus import Bus, is_user_service
from upgrader.systemd.cgroup import unit_of

_BUS = 1.0  # seconds


def require_root(caller: Caller) -> None:
    """Root steers; below a user's own service manager, that user. Raises VarlinkError."""
    if caller.uid != 0 and not (is_user_service() and caller.uid == os.geteuid()):
        raise denied()


def require_takeover(caller: Caller, unit: str) -> str:
    """It is the control process of the unit; root may do as it does. Returns the cgroup of the unit,
    empty if PID 1 does not say. Raises VarlinkError."""
    group = ""
    try:
        with Bus(_BUS) as bus:
            control = bus.get(unit, "ControlPID")
            with contextlib.suppress(BusError):
                group = bus.text(unit, "ControlGroup")
    except BusError as error:
        raise refused(f"systemd does not say who takeover is: {error}") from error
    if caller.pid != control and caller.uid != 0:
        raise refused(f"process {caller.pid} is not the control process of this unit")
    return group


def is_of_unit(group: str, unit: str, root: str) -> bool:
    """Whether a /proc/PID/cgroup lies in the cgroup of a unit, `root` as PID 1 names it, or below
    (Delegate=)."""
    with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
        mine = file.read()
    if root and _below(mine, root):  # else in a cgroup namespace, where names are others
        return _below(group, root)
    return unit_of(group) == unit


def _below(group: str, root: str) -> bool:
    """Whether a /proc/PID/cgroup names `root` or something below it, in systemd's hierarchy."""
    return any(
        re.match(r"(0:|\d+:name=systemd):", line)
        and (line.split(":", 2)[2] + "/").startswith(root.rstrip("/") + "/")
        for line in group.splitlines()
    )
