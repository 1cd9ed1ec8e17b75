# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts a unit that has failed, with what PID 1 holds for it."""

from upgrader.protocol.parameters import Mode
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.unit import Unit
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import parked_image
from upgrader.tool.outcome import Outcome, Result, Tell
from upgrader.tool.restart_mode import await_restart
from upgrader.tool.startable import startable
from upgrader.tool.systemd_client import Systemd


def has_failed(unit: Unit) -> bool:
    """Whether PID 1 has given it up, or is between two attempts of its own to start it."""
    return unit.load_state == "loaded" and (unit.active_state == "failed" or unit.retries)


def is_kept(systemd: Systemd, unit: Unit) -> bool:
    """Whether it has failed, and PID 1 holds something of ours for it.

    Before systemd 254, which does not tell names, whatever it holds counts.
    """
    if not has_failed(unit) or not unit.stored_fds:
        return False
    names = systemd.fd_store(unit).names
    return names is None or any(StoreName.parse(name) for name in names)


def start_again(systemd: Systemd, unit: Unit, timeout: float | None, progress: Tell) -> Outcome:
    """Start a unit that has failed, and judge it; raises UnitError only if nothing was done.

    A cold start although an image was parked is a failure. `timeout` as for an upgrade.
    """
    parked = parked_image(systemd.fd_store(unit))
    attempt = Attempt(systemd, unit, None, Mode.RESTART, "", timeout, progress)
    with startable(systemd, unit):
        if unit.need_daemon_reload:
            systemd.daemon_reload(unit.id)
        # Not start: that would wait for the next automatic restart.
        job = systemd.restart(unit)
        attempt.say(f"has failed; systemd starts it (job {job})")
        outcome = await_restart(attempt, job)
    after = outcome.after
    if after and outcome.result is Result.DONE:
        text = f"started, with what systemd held for it: {after}"
        return attempt.done(text, after, outcome.pause_seconds)
    # PID 1 passes all that it holds: what found no image, without a name to tell, had none.
    if outcome.result is Result.WITHOUT_IMAGE and not parked and after and not after.set_aside:
        text = f"started, and no image was parked for it: {after}"
        return attempt.done(text, after, outcome.pause_seconds)
    return outcome
