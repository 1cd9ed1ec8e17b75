# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns a unit after an upgrade: PID 1 names the main process, the instances say the rest.

In this order: the main process has committed; a draining source says that it has; the source serves
on, and says why; nobody says, and it is undecided. What the journal, STATUS= and the result of the
job say explains an outcome, and decides none. An instance of interface 1 keeps less: it is judged by
its process, its generation, and the phase of its last migration.
"""

import contextlib
import time
from dataclasses import dataclass

from upgrader.codes import Code
from upgrader.protocol.phase import Decision, Phase
from upgrader.protocol.varlink_types import Description, Last
from upgrader.systemd.unit import Unit
from upgrader.tool import instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.instance_client import InstanceError

#: Seconds for a new main process to say who it is; it takes milliseconds.
INTRODUCTION = 5.0
#: Seconds for the source to decide once nobody waits for it: its own limits are shorter.
_DECISION = 15.0
_AGAIN = 0.02

_CODES = {
    Phase.FAILED: Code.UNKNOWN,
    Phase.CANCELLED: Code.CANCELLED,
    Phase.PREFLIGHT: Code.PREFLIGHT_PASSED,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an upgrade was decided, why, and who serves: `now` is PID 1's view of the unit, `main` what
    its main process says, None if it does not answer."""

    decision: Decision
    now: Unit
    main: Description | None = None
    code: Code = Code.UNKNOWN
    reason: str = ""


def decide(attempt: Attempt, now: Unit) -> Verdict:
    """The verdict on a live upgrade, or a preflight, whose job is over; raises UnitError."""
    deadline = time.monotonic() + _DECISION
    while now.serves:
        if now.main_pid != attempt.unit.main_pid:
            main = instance_client.introduced(attempt.systemd, now, INTRODUCTION)
            return Verdict(_of_main(attempt, now, main), now, main)
        said = _of_source(attempt, now)
        if said.decision is Decision.ABORTED:
            return Verdict(said.decision, now, None, Code(said.code), said.reason)
        if said.side == "destination" and said.decision is Decision.COMMITTED:
            # It was the main process already when this command first asked about the unit.
            return Verdict(
                said.decision, now, instance_client.introduced(attempt.systemd, now, INTRODUCTION)
            )
        # Committed, the source is about to name the new main process to PID 1.
        if time.monotonic() > deadline:
            break
        time.sleep(_AGAIN)
        now = attempt.systemd.unit(now.id)
    return Verdict(Decision.NONE, now)


def is_newer(attempt: Attempt, main: Description) -> bool:
    """Whether an instance goes on from the one before. Another upgrade may have come first: then
    this one is done as well."""
    if main.last.id and main.last.id == attempt.id:
        return main.last.decision is Decision.COMMITTED
    if attempt.before:
        return main.generation > attempt.before.generation
    return main.last.decision is Decision.COMMITTED and main.last.side == "destination"


def _of_main(attempt: Attempt, now: Unit, main: Description | None) -> Decision:
    if main:
        return Decision.COMMITTED if is_newer(attempt, main) else Decision.NONE
    for old in instance_client.describe_draining(now, user=attempt.systemd.user):
        if attempt.id and old.last.id == attempt.id:
            return old.last.decision
    return Decision.NONE


def _of_source(attempt: Attempt, now: Unit) -> Last:
    """What the main process says, which served before; nothing if it does not answer. The new one may
    have its place already, and PID 1 not know it yet."""
    user = attempt.systemd.user
    with contextlib.suppress(InstanceError):
        if attempt.id and attempt.before and attempt.before.interface > 1:
            return instance_client.withdraw(now, attempt.id, pid=now.main_pid, user=user)
        said = instance_client.describe(now, pid=now.main_pid, user=user)
        if said.interface > 1 and attempt.before and said.last.id != attempt.before.last.id:
            return said.last
        return _of_migration(said, attempt.before)
    return Last()


def _of_migration(said: Description, before: Description | None) -> Last:
    """The same of an instance of interface 1."""
    last = said.migration
    if before is None or last.began == before.migration.began:
        return Last(decision=Decision.ABORTED, code=Code.TAKEOVER_GONE)  # and none has begun
    code = _CODES.get(last.phase)
    if code is None:
        return Last(decision=Decision.NONE)
    return Last(decision=Decision.ABORTED, code=code, reason=last.reason)
