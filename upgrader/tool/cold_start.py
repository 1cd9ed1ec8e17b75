# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts a unit without an image: of one that does not run, or of one that runs, which is a cold
restart. The image is set aside, not destroyed.

The generation to leave out is given to the new instance in the environment, by a drop-in below
/run that exists only as long as this takes.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from upgrader.protocol.parameters import Mode
from upgrader.systemd.unit import Unit
from upgrader.tool import failure_cause, instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.blockers import not_ours, not_running, parked_image, what_to_do
from upgrader.tool.outcome import Outcome, Result, Tell, Verb
from upgrader.tool.presence import look
from upgrader.tool.startable import drop_in, startable
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import JobConflict, UnitError, unit_name
from upgrader.tool.upgrade import refuse_if_busy, settle

#: Read by an instance when it starts: a generation, or "all" where PID 1 cannot name it.
VARIABLE = "UPGRADER_DISCARD"
_DISCARD = f"[Service]\nEnvironment={VARIABLE}={{}}\n"
#: Exists only while this runs.
DROP_IN = "90-upgrader-discard.conf"


def discard(
    unit: str,
    *,
    timeout: float | None = None,
    user: bool = False,
    progress: Tell = lambda text: None,
) -> Outcome:
    """Start one unit that does not run without its parked image; raises nothing that is expected.

    A unit that serves has loaded its image: nothing is done then. `timeout` as for an upgrade.
    """
    return _carry_out(Verb.DISCARD, _discard, unit, timeout, user, progress)


def restart_cold(
    unit: str,
    *,
    timeout: float | None = None,
    user: bool = False,
    progress: Tell = lambda text: None,
) -> Outcome:
    """Restart one unit as if for the first time: listeners stay, connections and state do not.

    Raises nothing that is expected. `timeout` as for an upgrade. A hold is lifted if it is done.
    """
    return _carry_out(Verb.RESTART, _restart_cold, unit, timeout, user, progress)


def _carry_out(
    verb: Verb,
    work: Callable[[Systemd, str, float | None, Tell], Outcome],
    unit: str,
    timeout: float | None,
    user: bool,
    progress: Tell,
) -> Outcome:
    begin = time.monotonic()
    try:
        unit = unit_name(unit)
        with Systemd(user=user) as systemd:
            outcome = work(systemd, unit, timeout, progress)
            outcome = replace(outcome, systemd=systemd.version)
    except UnitError as error:
        outcome = Outcome.of_error(verb, unit, error)
    except OSError as error:
        outcome = Outcome.failed(
            verb,
            unit,
            Result.NO_PERMISSION,
            f"cannot write the drop-in {error.filename}: {error.strerror}",
            "run the command as root, with sudo for instance",
        )
    return replace(outcome, seconds=round(time.monotonic() - begin, 6))


def _discard(systemd: Systemd, name: str, timeout: float | None, progress: Tell) -> Outcome:
    unit = systemd.unit(name)
    if unit.serves:
        said = look(systemd, unit).said
        status = instance_client.status(said) if said else None
        says = f" ({status})" if status else ""
        done = f"it serves{says}: no image is parked, nothing to discard"
        return Outcome.done(Verb.DISCARD, unit.id, done, before=status, after=status)
    refuse_if_busy(systemd, unit)
    parked = parked_image(systemd.fd_store(unit))
    if parked is None:
        return Outcome.failed(
            Verb.DISCARD,
            unit.id,
            Result.NOT_SERVING,
            "no image is parked for it, so there is nothing to discard",
            f"start it: systemctl start {unit.id}",
        )
    image = f"image of generation {parked}" if parked else "image"
    with (
        startable(systemd, unit),
        drop_in(systemd, unit, DROP_IN, _DISCARD.format(parked or "all")),
    ):
        return _start(systemd, unit, Verb.DISCARD, image, timeout, progress)


def _restart_cold(systemd: Systemd, name: str, timeout: float | None, progress: Tell) -> Outcome:
    unit = systemd.unit(name)
    refuse_if_busy(systemd, unit)
    found = look(systemd, unit)
    obstacle = not_running(systemd, unit) or not_ours(unit, found)
    if obstacle is not None:
        result = Result.OLD_SERVES if unit.serves else Result.NOT_SERVING
        return Outcome.failed(Verb.RESTART, unit.id, result, obstacle.cause, obstacle.remedy)
    before = instance_client.status(found.said) if found.said else None
    with startable(systemd, unit), drop_in(systemd, unit, DROP_IN, _DISCARD.format("all")):
        outcome = _start(systemd, unit, Verb.RESTART, "image", timeout, progress)
    return settle(systemd, replace(outcome, before=before))


def _start(
    systemd: Systemd,
    unit: Unit,
    verb: Verb,
    image: str,
    timeout: float | None,
    progress: Tell,
) -> Outcome:
    attempt = Attempt(systemd, unit, None, Mode.RESTART, "", timeout, progress)
    # Not start: that would wait for the next automatic restart.
    job = systemd.restart(unit)
    attempt.say(f"systemd starts it without the {image} (job {job})")
    try:
        _, now = attempt.follow(job)
    except JobConflict:
        raise
    except UnitError as error:
        now = systemd.unit(unit.id)
        if not now.serves:
            outcome = Outcome.of_error(verb, unit.id, error, Result.NOT_SERVING)
            return replace(outcome, retries=now.may_serve_soon)
    if not now.serves:
        why = failure_cause.cause(
            failure_cause.read(unit, attempt.since, user=systemd.user), now
        ).text
        return Outcome.failed(
            verb, unit.id, Result.NOT_SERVING, why, what_to_do(systemd, now),
            retries=now.may_serve_soon,
        )  # fmt: skip
    said = look(systemd, now).said
    after = instance_client.status(said) if said else None
    if after is not None and after.source_generation is not None:
        return Outcome.failed(
            verb,
            unit.id,
            Result.OLD_SERVES,
            f"it loaded the image all the same: {after}",
            f"see: journalctl -u {unit.id}",
            after=after,
        )
    says = f": {after}" if after else ""
    done = f"started without the {image}{says}"
    return Outcome.done(verb, unit.id, done, after=after, changed=True)
