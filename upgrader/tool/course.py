# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follow a live upgrade as the running instance tells it, and add up where its time went."""

import contextlib
import threading
import time
from collections.abc import Mapping

from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Migration
from upgrader.protocol.wording import show_duration
from upgrader.tool import instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.instance_client import InstanceError

#: Seconds to wait for the last phase of an upgrade whose outcome is known.
_LAST_PHASE = 1.0
#: What each part of the time was needed for.
_PARTS = {
    "asked": "to ask systemd",
    "takeover": "for takeover",
    Phase.SETUP: "to start the new version",
    Phase.COLLECTING: "to come to rest",
    Phase.FROZEN: "to save",
    Phase.LOADING: "to load",
    Phase.COMMITTED: "to name the new main process",
}


def show_times(times: Mapping[str, float]) -> str:
    """Where the time went, for people; `times` as of `Course.times`."""
    parts = (f"{show_duration(took)} {_PARTS.get(part, part)}" for part, took in times.items())
    return f"time: {', '.join(parts)}"


class Course:
    """Follows an attempt from now on, and says each phase."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._queued = self._registered = 0.0  # of `time.monotonic`
        self._last = Migration()
        self._thread = threading.Thread(target=self._follow, name="phases", daemon=True)
        self._thread.start()

    def queued(self) -> None:
        """Note that systemd has the job."""
        self._queued = time.monotonic()

    def times(self) -> dict[str, float]:
        """Seconds: `asked` until systemd had the job, `takeover` until the new version was about to
        start, then by phase; empty if it did not come to that."""
        if not self._registered:
            return {}
        self._thread.join(_LAST_PHASE)
        asked, takeover = self._queued - self._attempt.begun, self._registered - self._queued
        return {"asked": round(asked, 6), "takeover": round(takeover, 6), **self._last.times}

    def _follow(self) -> None:
        attempt, before = self._attempt, None
        # The instance that is replaced ends in the middle of its answer.
        with contextlib.suppress(InstanceError):
            for migration in instance_client.phases(attempt.unit, user=attempt.systemd.user):
                before = migration.began if before is None else before
                if migration.began == before:
                    continue
                self._last = migration
                self._registered = self._registered or time.monotonic()
                if not migration.phase.ended:
                    attempt.say(f"{migration.phase} ({show_duration(migration.seconds)})")
