# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mode exec: the instance of one unit becomes its new version in the same process, and is judged.

PID 1 has no part in it and no job for it: the instance itself is asked, before and afterwards.
"""

import contextlib
import time
from collections.abc import Sequence

from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.unit import Unit
from upgrader.tool import failure_cause, instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import what_to_do
from upgrader.tool.instance_client import SILENT, InstanceError
from upgrader.tool.outcome import Outcome, Result
from upgrader.tool.unit_errors import JobConflict, WaitTimeout

_AGAIN = 0.05
#: Seconds that a socket may be waited for, at most: its milliseconds are a C int.
_LONGEST = 1e6


def execute(attempt: Attempt, command: Sequence[str] = ()) -> Outcome:
    """Upgrade one unit by an execve(2) of `command` (without one, of what ExecStart= says).

    Raises UnitError only if nothing was done. Without a timeout, the new version may take as long
    as TimeoutStartSec= allows a start.
    """
    systemd, unit = attempt.systemd, attempt.unit
    systemd.watch(unit)
    attempt.say(f"process {unit.main_pid} becomes the new version")
    limit = unit.timeout_start_usec / 1e6 if attempt.timeout is None else attempt.timeout
    try:
        instance_client.execute(
            unit, command, upgrade=attempt.id, timeout=min(limit, _LONGEST), user=systemd.user
        )
    except InstanceError as error:
        if error.name == SILENT:
            see = f"see: journalctl -u {unit.id}"
            return attempt.failed(Result.UNDECIDED, error.message, see)
        if error.name == "Busy":
            raise JobConflict(unit.id, error.message) from error
        failed = error.name == "ExecFailed"
        return attempt.failed(
            Result.OLD_SERVES, error.message, error.remedy,
            code=Code.LOAD_FAILED if failed else Code.REFUSED, bad_version=failed,
        )  # fmt: skip
    try:
        now, main = _next(attempt, limit)
    except WaitTimeout:
        return attempt.failed(
            Result.NOT_SERVING,
            f"the new version was not ready after {limit:g}s",
            "put a good version in place, then restart it, which loads what was kept:"
            f" systemctl restart {unit.id}",
            code=Code.NOT_READY_IN_TIME,
            bad_version=attempt.timeout is None,
        )
    entries = failure_cause.read(unit, attempt.since, user=systemd.user)
    if main is None:
        return attempt.failed(
            Result.NOT_SERVING,
            failure_cause.cause(entries, now).text,
            what_to_do(systemd, now),
            bad_version=True,
            now=now,
        )
    after = instance_client.status(main)
    if after.generation > attempt.generation and after.origin is Origin.EXEC:
        return attempt.done(f"upgraded in {attempt.took}: {after}", after, after.pause)
    # Restart= has started what ExecStart= says, and that has loaded PID 1's copy, or nothing.
    why = failure_cause.reported(entries) or "the new version has ended"
    return attempt.failed(
        Result.OLD_SERVES if after.origin is Origin.RESTART else Result.WITHOUT_IMAGE,
        f"{why}; systemd has started it again: {after}",
        f"see: journalctl -u {unit.id}",
        bad_version=True,
        after=after,
    )


def _next(attempt: Attempt, limit: float) -> tuple[Unit, Description | None]:
    """The unit once another instance answers, or none is started any more; raises WaitTimeout."""
    deadline = time.monotonic() + limit
    while True:
        now = attempt.systemd.unit(attempt.unit.id)
        if now.serves:
            with contextlib.suppress(InstanceError):
                said = instance_client.describe(now, pid=now.main_pid, user=attempt.systemd.user)
                if said.generation != attempt.generation:
                    return now, said
        elif now.settled and not now.retries:
            return now, None
        if time.monotonic() > deadline:
            raise WaitTimeout(now.id, limit)
        with contextlib.suppress(WaitTimeout):
            next(attempt.systemd.changes(now, _AGAIN))
