# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the version now on disk would take over: it starts, loads all of the image and is checked,
and goes away again. Clients see what they see of an upgrade that fails: a pause of milliseconds."""

from upgrader import instances
from upgrader.description import Phase
from upgrader.instances import InstanceError
from upgrader.systemd.unit import Unit, UnitError
from upgrader.systemd.units import Systemd


def rehearse(systemd: Systemd, unit: Unit, timeout: float | None = None) -> str:
    """Why the new version would not take over; empty if it would. Raises UnitError.

    PID 1 makes its process from the current unit file, as in an upgrade; UPGRADER_REHEARSAL=1 in
    its environment tells the program that it will own nothing.
    """
    try:
        instances.rehearse(unit, user=systemd.user)
        word = systemd.wait_job(unit, systemd.reload(unit), timeout)
        last = instances.describe(unit, user=systemd.user).migration
    except InstanceError as error:
        raise UnitError(unit.id, error.message, remedy=error.remedy) from error
    if last.phase is Phase.REHEARSED and word == "done":
        return ""
    return last.reason or f"the reload ended with {word}"
