# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put a unit on hold, and release it, as an admin asks; failures are outcomes, not exceptions."""

from collections.abc import Callable

from upgrader.tool import hold
from upgrader.tool.hold import Hold, HoldError, HoldKind
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.presence import look
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import NoSuchUnit, UnitError, unit_name


def put(name: str, why: str, *, user: bool = False) -> Outcome:
    """Have hooks and `upgrade` leave a unit alone until it is released."""

    def work(systemd: Systemd, unit: str) -> str:
        hold.place(Hold.now(systemd.unit(unit).id, why, kind=HoldKind.ADMIN), user=user)
        return f"on hold until it is lifted: upgrader unhold {unit}"

    return _carry_out(Verb.HOLD, name, work, user)


def release(name: str, *, user: bool = False) -> Outcome:
    """End the hold on a unit, whoever has put it there."""

    def work(systemd: Systemd, unit: str) -> str:
        try:
            now = systemd.unit(unit)
        except NoSuchUnit:  # its hold is left of it
            if not hold.read(unit, user=user):
                raise
            said, held = None, True
        else:
            said = look(systemd, now, patient=False).said
            held = hold.standing(now, said, user=user) is not None
            unit = now.id
        hold.release(unit, said, user=user)
        return "the hold is lifted" if held else "there is no hold on it"

    return _carry_out(Verb.UNHOLD, name, work, user)


def _carry_out(verb: Verb, name: str, work: Callable[[Systemd, str], str], user: bool) -> Outcome:
    try:
        name = unit_name(name)
        with Systemd(user=user) as systemd:
            return Outcome.done(verb, name, work(systemd, name))
    except UnitError as error:
        return Outcome.of_error(verb, name, error)
    except HoldError as error:
        return Outcome.failed(verb, name, Result.NO_PERMISSION, error.message, error.remedy)
