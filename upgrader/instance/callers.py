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


def require_takeover(caller: Caller, unit: str) -> None:
    """It is the control process of the unit; root may do as it does. Raises VarlinkError."""
    try:
        with Bus(_BUS) as bus:
            control = bus.get(unit, "ControlPID")
    except BusError as error:
        raise refused(f"systemd does not say who takeover is: {error}") from error
    if caller.pid != control and caller.uid != 0:
        raise refused(f"process {caller.pid} is not the control process of this unit")


def is_of_unit(group: str, unit: str) -> bool:
    """Whether a /proc/PID/cgroup lies in the cgroup of a unit, or below (Delegate=)."""
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        root = bus.text(unit, "ControlGroup")
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
