# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steers the instance that serves over its socket: sets parameters, calls off an upgrade.

It starts and stops nothing; that is `upgrade`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from upgrader.systemd.unit import Unit
from upgrader.tool import instance_client
from upgrader.tool.instance_client import DENIED, LEFT, NOBODY, InstanceError
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError, unit_name

_SOCKET = 5.0  # seconds in which a new instance should have its socket


def set_parameters(unit: str, values: Mapping[str, str], *, user: bool = False) -> Outcome:
    """Set parameters until the service is stopped; raises nothing that is expected."""

    def work(found: Unit) -> str:
        held = instance_client.set_parameters(found, values, user=user)
        names = sorted({name.partition(".")[0] for name in values})
        return "now " + " ".join(f"{name}={held.get(name, '?')}" for name in names)

    return _steer(Verb.SET, unit, work, user)


def for_one_call(
    unit: str, values: Mapping[str, str], work: Callable[[], Outcome], *, user: bool = False
) -> Outcome:
    """Do `work`, an upgrade, with parameters that are taken back afterwards, whoever serves then."""
    before: Mapping[str, str] = {}

    def note(found: Unit) -> str:
        nonlocal before
        before = instance_client.describe(found, user=user).overrides
        return ""

    outcome = _steer(Verb.UPGRADE, unit, note, user)
    if outcome.result is Result.DONE:
        outcome = replace(set_parameters(unit, values, user=user), verb=Verb.UPGRADE)
    if outcome.result is not Result.DONE:
        return outcome
    outcome = work()
    earlier = {name: before.get(name, "") for name in values}
    deadline = time.monotonic() + _SOCKET
    while (back := set_parameters(unit, earlier, user=user)).result is not Result.DONE:
        if not outcome.serves or time.monotonic() > deadline:
            kept = f"not taken back: {', '.join(values)} ({back.cause})"
            return replace(outcome, warnings=(*outcome.warnings, kept))
        time.sleep(0.02)  # an instance that was just started opens its socket
    return outcome


def cancel(unit: str, *, user: bool = False) -> Outcome:
    """Call off the upgrade under way; raises nothing that is expected."""

    def work(found: Unit) -> str:
        source = instance_client.cancel(found, user=user).source
        return f"the upgrade is cancelled, and generation {source} serves on"

    return _steer(Verb.CANCEL, unit, work, user)


def _steer(verb: Verb, name: str, work: Callable[[Unit], str], user: bool) -> Outcome:
    try:
        with Systemd(user=user) as systemd:
            unit = systemd.unit(unit_name(name))
            version = systemd.version
    except UnitError as error:
        return Outcome.of_error(verb, name, error)
    result, cause, remedy = Result.OLD_SERVES, "", ""
    if not unit.serves:
        result, cause = Result.NOT_SERVING, f"it is not running ({unit.active_state})"
        remedy = f"start it: systemctl start {unit.id}"
    else:
        try:
            return replace(Outcome.done(verb, unit.id, work(unit)), systemd=version)
        except InstanceError as error:
            result = _RESULTS.get(error.name, Result.OLD_SERVES)
            cause, remedy = error.message, error.remedy
            if error.name in (NOBODY, LEFT):
                cause = f"it does not use upgrader ({cause})"
    return replace(Outcome.failed(verb, unit.id, result, cause, remedy), systemd=version)


_RESULTS = {
    "InvalidParameter": Result.USAGE,
    DENIED: Result.NO_PERMISSION,
}
