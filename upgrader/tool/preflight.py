# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the version now on disk would take over: it starts, loads all of the image and is checked,
and goes away again. Clients see what they see of an upgrade that fails: a pause of milliseconds."""

from upgrader.codes import Code
from upgrader.protocol.phase import Decision
from upgrader.tool import instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.instance_client import InstanceError
from upgrader.tool.live_mode import explain, settled
from upgrader.tool.unit_errors import UnitError
from upgrader.tool.verdict import Verdict, decide


def preflight(attempt: Attempt) -> Verdict:
    """Find out whether the new version would take over; raises UnitError if that cannot be done.

    PID 1 makes its process from the current unit file, as in an upgrade; UPGRADER_PREFLIGHT=1 in
    its environment tells the program that it will own nothing.
    """
    systemd, unit = attempt.systemd, attempt.unit
    interface = attempt.before.interface if attempt.before else 1
    try:
        instance_client.preflight(unit, attempt.id, interface=interface, user=systemd.user)
    except InstanceError as error:
        raise UnitError(unit.id, error.message, remedy=error.remedy) from error
    _, now = attempt.follow(systemd.reload(unit), settled)
    return decide(attempt, now)


def objection(attempt: Attempt, verdict: Verdict) -> str:
    """Why the new version would not take over; empty if it would."""
    if verdict.decision is Decision.ABORTED and verdict.code is Code.PREFLIGHT_PASSED:
        return ""
    if verdict.decision is Decision.COMMITTED:
        return "it has taken over: its library is too old for a preflight"
    if not verdict.now.serves:
        return f"the unit serves no more: it is {verdict.now.active_state}"
    return explain(attempt, verdict)
