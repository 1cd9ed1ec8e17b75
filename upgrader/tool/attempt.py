# SPDX-License-Identifier: LGPL-2.1-or-later
"""One upgrade of one unit while it goes on: what ran before, who is told, and how it is waited for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from upgrader.codes import Code
from upgrader.protocol.parameters import Mode
from upgrader.protocol.status_text import Status
from upgrader.protocol.varlink_types import Description
from upgrader.protocol.wording import counted, show_duration
from upgrader.systemd.unit import Unit
from upgrader.tool.instance_client import status
from upgrader.tool.outcome import Outcome, Result, Tell, Verb
from upgrader.tool.output_files import OutputFiles
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError

_PHASES = {
    "deactivating": "the old instance stops",
    "activating": "the new instance starts",
    "active": "ready",
}


_NAMED = 10  # fields that are named in a warning


def _now() -> int:
    return time.monotonic_ns() // 1000


@dataclass(frozen=True, slots=True)
class Attempt:
    """One upgrade.

    `unit` is what PID 1 said of it, and `before` what its instance said, before anything was done;
    `before` is None if the instance could not be asked. `id` is empty for an upgrade that somebody
    else has asked for, and that had not begun. `timeout`: seconds to wait, None for as long as
    systemd's job takes. `since`: microseconds of CLOCK_MONOTONIC; what the journal says from then on
    may be about this upgrade. `begun`: when it was asked for, seconds of CLOCK_MONOTONIC. `output`: the
    files that the unit writes to instead of the journal.
    """

    systemd: Systemd
    unit: Unit
    before: Description | None
    mode: Mode
    id: str
    timeout: float | None
    progress: Tell
    since: int = field(default_factory=_now)
    begun: float = field(default_factory=time.monotonic)
    output: OutputFiles = field(default_factory=OutputFiles)

    @property
    def generation(self) -> int:
        """The generation that served before; 0 if it is not known."""
        return self.before.generation if self.before else 0

    @property
    def took(self) -> str:
        """How long it has taken until now."""
        return show_duration((_now() - self.since) / 1e6)

    def at_most(self, seconds: float) -> float:
        """What is left of so many seconds once no more is waited for than `timeout` since it began."""
        if self.timeout is None:
            return seconds
        return min(seconds, max(self.begun + self.timeout - time.monotonic(), 0.0))

    def say(self, text: str) -> None:
        """Tell who waits how it goes."""
        self.progress(f"{self.unit.id}: {text}")

    def follow(
        self, job: int, settled: Callable[[Unit], bool] = lambda unit: unit.settled
    ) -> tuple[str, Unit]:
        """Wait for the end of a job and for the unit to settle; returns PID 1's word and the unit.

        Raises WaitTimeout. PID 1 is asked nothing before the job has ended: each question would
        lengthen the pause.
        """
        begin = time.monotonic()
        phase, word = "", ""
        for change in self.systemd.changes(self.unit, self.timeout):
            state = change.values.get("ActiveState", b"").decode()
            # Until the stop begins, PID 1 says that the old instance is active.
            if _PHASES.get(state, phase) != phase and (phase or state != "active"):
                phase = _PHASES[state]
                self.say(f"{phase} ({show_duration(time.monotonic() - begin)})")
            if change.job_id == job:
                word = change.job_result
            # Between the failure and the next attempt of its own, PID 1 goes through "failed".
            if word and (change.job_id == job or "ActiveState" in change.values):
                now = self.systemd.unit(self.unit.id)
                if settled(now):
                    return word, now
        raise AssertionError("unreachable")

    # The outcome

    def done(self, text: str, after: Status, pause: float | None) -> Outcome:
        """It is done; `pause`: seconds in which nobody served."""
        return Outcome.done(
            Verb.UPGRADE, self.unit.id, text, mode=self.mode, upgrade=self.id, before=self._before,
            after=after, pause_seconds=pause, warnings=_lost(after), changed=True,
        )  # fmt: skip

    def failed(
        self,
        result: Result,
        cause: str,
        remedy: str = "",
        *,
        code: Code | None = None,
        bad_version: bool = False,
        now: Unit | None = None,
        after: Status | None = None,
        pause: float | None = None,
    ) -> Outcome:
        """It is not done, and this is how the unit stands; `now`: one that does not serve."""
        return Outcome.failed(
            Verb.UPGRADE, self.unit.id, result, cause, remedy, mode=self.mode, upgrade=self.id,
            code=code, bad_version=bad_version, retries=bool(now and now.may_serve_soon),
            before=self._before, after=after, pause_seconds=pause,
        )  # fmt: skip

    def lost(self, error: UnitError) -> Outcome:
        """PID 1 was lost on the way."""
        return self.failed(Result.UNKNOWN, error.message, error.remedy)

    @property
    def _before(self) -> Status | None:
        return status(self.before) if self.before else None


def _lost(after: Status) -> tuple[str, ...]:
    """Warnings if not everything could cross."""
    warnings = []
    if connections := after.left_behind - len(after.unsaved):
        lost = counted(connections, "connection or turn")
        warnings.append(f"not kept, but drained or cut: {lost}")
    if after.unsaved:
        states = ", ".join(after.unsaved)
        warnings.append(f"the old instance could not save, and so the new one has anew: {states}")
    if after.datagrams_lost:
        warnings.append(
            f"{after.datagrams_lost} datagrams came in the pause and were dropped by the kernel:"
            " the program can declare a larger receive_buffer"
        )
    if after.dropped:
        fields = ", ".join(after.dropped[:_NAMED])
        more = f" and {len(after.dropped) - _NAMED} more" if len(after.dropped) > _NAMED else ""
        warnings.append(f"fields dropped, which the new version does not know: {fields}{more}")
    return tuple(warnings)
