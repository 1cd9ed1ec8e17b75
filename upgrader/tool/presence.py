# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the process that serves a unit uses the library, and what it says.

Told by its instance's socket, and by the names of FDs that PID 1 holds for it. STATUS= tells
nothing: any program may send it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from upgrader.protocol.varlink_types import Description
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.live_limits import is_runner
from upgrader.systemd.unit import Unit
from upgrader.tool import instance_client
from upgrader.tool.at_once import at_once
from upgrader.tool.instance_client import DENIED, LEFT, NOBODY, SILENT, InstanceError
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import AccessDenied

#: Seconds that an instance may take from READY=1 to its socket, and the next one to take the place of
#: one that it has replaced.
_YOUNG = 5.0
_BETWEEN = 1.0
_AGAIN = 0.02
NOTIFY = ("notify", "notify-reload")


@dataclass(frozen=True, slots=True)
class Presence:
    """What is known of the instance: `said` is its own answer, `error` why there is none; `stored`:
    PID 1 holds FDs of ours for the unit."""

    said: Description | None = None
    error: InstanceError | None = None
    stored: bool = False

    @property
    def ours(self) -> bool:
        """Whether the process that serves uses the library, as far as can be seen."""
        return self.said is not None or self.stored or self.denied or self.silent

    @property
    def silent(self) -> bool:
        """Whether a process of the unit has our socket, and gives no answer, or none that can be read."""
        return self.error is not None and self.error.name == SILENT

    @property
    def denied(self) -> bool:
        """Whether there is an instance, and this user may not ask it."""
        return self.error is not None and self.error.name == DENIED


def look(systemd: Systemd, unit: Unit, *, patient: bool = True) -> Presence:
    """Ask the instance of a unit that serves; if `patient`, wait for one that has just begun to."""
    # Of a unit without these, no process can use the library, and none is waited for.
    patient = patient and unit.type in NOTIFY and unit.fd_store_max > 0
    deadlines = {
        NOBODY: unit.active_enter_usec / 1e6 + _YOUNG,
        LEFT: time.monotonic() + _BETWEEN,
    }
    while unit.serves:
        try:
            return Presence(instance_client.describe(unit, user=systemd.user))
        except InstanceError as error:
            if not patient or time.monotonic() > deadlines.get(error.name, 0.0):
                return Presence(error=error, stored=has_stored(systemd, unit))
        time.sleep(_AGAIN)
        unit = systemd.unit(unit.id)
    return Presence(stored=has_stored(systemd, unit))


def look_at_all(
    systemd: Systemd, units: Sequence[Unit]
) -> list[tuple[Presence, tuple[Description, ...]]]:
    """Ask the instances of all units at once, and those that they have replaced and that drain.

    All have one deadline, so that nobody waits for another's, and all of them take the time of one.
    """
    until, user = instance_client.deadline(), systemd.user
    draining = [instance_client.ask_draining(unit, until, user=user) for unit in units]
    asked: list[Callable[[], Description | InstanceError | None]] = []
    asked += (partial(_answer, unit, until, user) for unit in units)
    asked += (each for questions in draining for each in questions)
    answers = iter(at_once(asked))
    own = [_presence(systemd, unit, next(answers)) for unit in units]
    olds = [[next(answers) for _ in questions] for questions in draining]
    found = [tuple(each for each in old if isinstance(each, Description)) for old in olds]
    return list(zip(own, map(instance_client.still_draining, found), strict=True))


def _presence(systemd: Systemd, unit: Unit, answer: Description | InstanceError | None) -> Presence:
    if isinstance(answer, Description):
        return Presence(answer)
    return Presence(error=answer, stored=has_stored(systemd, unit))


def _answer(unit: Unit, until: float, user: bool) -> Description | InstanceError | None:
    """What the instance of a unit says, or why it says nothing; None if the unit does not serve."""
    try:
        return instance_client.describe(unit, until=until, user=user) if unit.serves else None
    except InstanceError as error:
        return error


def has_stored(systemd: Systemd, unit: Unit) -> bool:
    """Whether PID 1 holds FDs of ours; it tells their names from systemd 254 on, and to root."""
    try:
        names = systemd.fd_store(unit).names
    except AccessDenied:
        return False
    return any(StoreName.parse(name) for name in names or ())


def says_so(unit: Unit) -> bool:
    """Whether the command lines of a unit name this library, whatever runs now."""
    lines = (*unit.exec_start, *unit.exec_reload)
    return (
        is_runner(unit)
        or any(line.runs_takeover for line in lines)
        or any(word.startswith("upgrader.") for line in lines for word in line.arguments)
    )
