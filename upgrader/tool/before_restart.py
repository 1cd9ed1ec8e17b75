# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is waited for before PID 1 is asked for a restart, while the service serves.

A restart that has begun cannot be refused any more: what is busy then is cut.
"""

from __future__ import annotations

import time

from upgrader.protocol.systemd_syntax import time_span
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.unit import Unit
from upgrader.tool import instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.instance_client import InstanceError

_AGAIN = 0.1
_NAMED = 5


def await_drains(attempt: Attempt) -> tuple[str, ...]:
    """Wait until earlier generations have drained what they hold, for drain-timeout at most, and no
    longer than the attempt may take; returns warnings for what the restart cuts."""
    deadline = time.monotonic() + _drain_timeout(attempt)
    told = False
    while left := instance_client.describe_draining(attempt.unit, user=attempt.systemd.user):
        if time.monotonic() > deadline:
            break
        if not told:
            attempt.say(f"waits, serving: {', '.join(map(_drained, left))}")
            told = True
        time.sleep(_AGAIN)
    warnings = tuple(f"the restart has cut what {_drained(each)}" for each in left)
    for warning in warnings:
        attempt.say(f"warning: {warning.replace('has cut', 'cuts', 1)}")
    return warnings


def draining(unit: Unit, *, user: bool) -> tuple[str, ...]:
    """What a restart would wait for, in words."""
    found = instance_client.describe_draining(unit, user=user)
    return tuple(f"a restart waits, for drain-timeout at most: {_drained(each)}" for each in found)


def settle(attempt: Attempt) -> tuple[str, ...]:
    """Have the running instance wait for what it is at; returns warnings for what the restart cuts.

    Raises InstanceError if it would cut a turn or a handler in two, or could park nothing.
    """
    try:
        cut = instance_client.settle(
            attempt.unit, _drain_timeout(attempt), user=attempt.systemd.user
        )
    except InstanceError as error:
        if error.name == "Refused":
            raise
        return ()  # the restart itself waits as well, but cannot be refused
    if not cut:
        return ()
    more = f" and {len(cut) - _NAMED} more" if len(cut) > _NAMED else ""
    what = f"{', '.join(cut[:_NAMED])}{more}"
    attempt.say(f"warning: the restart cuts {what}")
    return (f"the restart has cut {what}",)


def _drain_timeout(attempt: Attempt) -> float:
    told = attempt.before.parameters.get("drain-timeout", "") if attempt.before else ""
    try:
        return attempt.at_most(time_span(told))
    except ValueError:
        return 0.0


def _drained(old: Description) -> str:
    count = f"{old.connections} connection{'s' * (old.connections != 1)}"
    what = ", ".join(f"{each.what or each.backend} of {each.peer}" for each in old.held[:_NAMED])
    return f"generation {old.generation} still drains {count}{f' ({what})' if what else ''}"
