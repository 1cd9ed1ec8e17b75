# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collect what there is to know of one unit, or of all that use the library.

PID 1 says whether it serves, the instance what it holds, and this machine whether it is held back.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from upgrader.protocol.status_text import Status
from upgrader.protocol.varlink_types import Description, Migration
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.unit import Unit
from upgrader.tool import counts, hold, instance_client
from upgrader.tool.counts import Counts
from upgrader.tool.credentials import stale_credentials
from upgrader.tool.hold import Hold
from upgrader.tool.instance_client import describe_draining
from upgrader.tool.presence import Presence, look, look_at_all, says_so
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import AccessDenied, NoSuchUnit, UnitError, WaitTimeout, unit_name

#: What `active` is of a unit that does not exist any more.
GONE = "not-found"
#: Seconds after which an instance is looked for again, if PID 1 has said nothing.
_AGAIN = 0.5


@dataclass(frozen=True, slots=True)
class Overview:
    """One unit now.

    `status` is how the instance came to be, `instance` all that it says when asked; `unreachable`
    says why it could not be. `text` is the STATUS= of the unit, which any program may write.
    `last_upgrade` is the last one that was done or has failed, as the instance or this tool knows it.
    `draining` were replaced and have not ended, `parked` are the names of our FDs that PID 1 holds
    (None where it does not say: before systemd 254, or to this user). `upgrades` counts those that
    this tool was asked for. `stale` are credentials whose files hold something else now.
    """

    unit: str
    active: str
    serves: bool
    pid: int
    status: Status | None = None
    instance: Description | None = None
    unreachable: str = ""
    uses_upgrader: bool = False
    text: str = ""
    draining: tuple[Description, ...] = ()
    hold: Hold | None = None
    parked: tuple[str, ...] | None = ()
    upgrades: Counts = field(default_factory=Counts)
    stale: tuple[str, ...] = ()
    last_upgrade: Migration = field(default_factory=Migration)

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it, and nothing is left of it."""
        kept = self.serves or self.hold or self.parked
        return not kept and self.active.partition(" ")[0] == "inactive"

    def json(self) -> bytes:
        """One object: the fields."""
        return msgspec.json.encode(self.builtins())

    def builtins(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        values: dict[str, Any] = msgspec.to_builtins(
            self, enc_hook=vars
        )  # of a `Value`, its fields
        return values


def read(systemd: Systemd, name: str) -> Overview:
    """Everything about one unit; raises UnitError if PID 1 does not know it or cannot be asked.

    Waits for an instance that has just begun to serve.
    """
    unit = systemd.unit(name)
    found = look(systemd, unit)
    overview = _overview(systemd, unit, found, describe_draining(unit, user=systemd.user))
    stale = stale_credentials(systemd, unit, found.said) if found.said else ()
    return replace(overview, stale=stale)


def read_all(systemd: Systemd) -> list[Overview]:
    """Every unit that uses the library: running, failed, held, or with something parked; also one of
    which nothing but its hold is left.

    What one of them does not answer keeps nobody from the others.
    """
    held = hold.on_file(user=systemd.user)
    units, found = [], []
    for name in sorted({*systemd.services(), *held}):
        with contextlib.suppress(UnitError):  # gone in the meantime
            if systemd.keeps(name) or name in held:
                try:
                    units.append(systemd.unit(unit_name(name)))
                except NoSuchUnit:
                    kept = hold.read(name, user=systemd.user)
                    found.append(
                        Overview(name, GONE, False, 0, uses_upgrader=bool(kept), hold=kept)
                    )
    for unit, (presence, old) in zip(units, look_at_all(systemd, units), strict=True):
        with contextlib.suppress(UnitError):
            found.append(_overview(systemd, unit, presence, old))
    shown = [each for each in found if each.uses_upgrader and not each.stopped]
    return sorted(shown, key=lambda each: each.unit)


def _overview(
    systemd: Systemd, unit: Unit, found: Presence, draining: tuple[Description, ...]
) -> Overview:
    held, parked = hold.standing(unit, found.said, user=systemd.user), _parked(systemd, unit)
    upgrades = Counts() if systemd.user else counts.read(unit.id)
    # What has failed says nothing any more, and may have left nothing.
    known = not unit.serves and (says_so(unit) or upgrades != Counts())
    return Overview(
        unit=unit.id,
        active=f"{unit.active_state} ({unit.sub_state})",
        serves=unit.serves,
        pid=unit.main_pid,
        status=instance_client.status(found.said) if found.said else None,
        instance=found.said,
        unreachable=str(found.error) if found.error and found.ours else "",
        uses_upgrader=bool(found.ours or held or parked or known),
        text=unit.status_text,
        draining=draining,
        hold=held,
        parked=parked,
        upgrades=upgrades,
        last_upgrade=_last_upgrade(found.said, upgrades),
    )


def follow(systemd: Systemd, name: str) -> Iterator[Migration]:
    """Every phase of every upgrade of one unit, from the one under way on, without an end."""
    unit = systemd.unit(name)
    last = Migration()
    while True:
        try:
            for now in instance_client.phases(unit, user=systemd.user):
                # The instance after an upgrade tells of the same one, from its own side.
                same = now.phase.ended and (now.source, now.destination) == (
                    last.source, last.destination,
                )  # fmt: skip
                if now.mode and not (same and last.phase.ended):
                    yield now
                last = now if now.mode else last
        except instance_client.InstanceError:
            # No instance has a socket now: one is between two, or it does not run.
            with contextlib.suppress(WaitTimeout):
                next(systemd.changes(unit, timeout=_AGAIN))


def _last_upgrade(said: Description | None, upgrades: Counts) -> Migration:
    """The last upgrade that anybody knows of; one that began later in the instance than in this tool
    is the same one."""
    own = instance_client.last_upgrade(said) if said else Migration()
    return max(own, upgrades.last, key=lambda each: each.began)


def _parked(systemd: Systemd, unit: Unit) -> tuple[str, ...] | None:
    """The names of our FDs in the FD store; None where PID 1 does not tell them, or not to us."""
    try:
        names = systemd.fd_store(unit).names
    except AccessDenied:
        return None
    return None if names is None else tuple(name for name in names if StoreName.parse(name))
