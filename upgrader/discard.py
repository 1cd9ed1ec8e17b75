# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts a unit without the image that is parked for it; the image is set aside, not destroyed.

The generation to leave out is given to the new instance in the environment, by a drop-in below
/run that exists only as long as this takes.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace

from upgrader.obstacles import parked_image, what_to_do
from upgrader.outcome import Outcome, Progress, Result, Verb
from upgrader.restarting import follow
from upgrader.systemd import cause
from upgrader.systemd.status import Status
from upgrader.systemd.unit import JobConflict, Unit, UnitError, unit_name
from upgrader.systemd.units import Systemd
from upgrader.upgrade import refuse_if_busy

#: Read by an instance when it starts: a generation, or "all" where PID 1 cannot name it.
VARIABLE = "UPGRADER_DISCARD"
#: Exists only while this runs.
DROP_IN = "/run/systemd/system/{unit}.d/90-upgrader-discard.conf"


def discard(
    unit: str, *, timeout: float | None = None, progress: Progress = lambda text: None
) -> Outcome:
    """Start one unit that does not run without its parked image; raises nothing that is expected.

    A unit that serves has loaded its image: nothing is done then. `timeout` as for an upgrade.
    """
    begin = time.monotonic()
    try:
        unit = unit_name(unit)
        with Systemd() as systemd:
            outcome = _discard(systemd, unit, timeout, progress)
            outcome = replace(outcome, systemd=systemd.version)
    except UnitError as error:
        outcome = Outcome.of_error(Verb.DISCARD, unit, error)
    return replace(outcome, seconds=round(time.monotonic() - begin, 6))


def _discard(systemd: Systemd, name: str, timeout: float | None, progress: Progress) -> Outcome:
    unit = systemd.unit(name)
    if unit.serves:
        status = Status.parse(unit.status_text)
        says = f" ({status})" if status else ""
        done = f"it serves{says}: no image is parked, nothing to discard"
        return Outcome(Verb.DISCARD, unit.id, Result.DONE, done=done, before=status, after=status)
    refuse_if_busy(systemd, unit)
    # Without a reference, PID 1 may forget a stopped unit, and what it stores for it, at any time.
    systemd.pin(unit.id)
    parked = parked_image(systemd.fd_store(unit))
    if parked is None:
        return Outcome(
            Verb.DISCARD,
            unit.id,
            Result.NOT_SERVING,
            cause="no image is parked for it, so there is nothing to discard",
            remedy=f"start it: systemctl start {unit.id}",
        )
    since = time.monotonic_ns() // 1000
    try:
        with _drop_in(systemd, unit, str(parked or "all")):
            return _start(systemd, unit, parked, timeout, progress, since)
    except OSError as error:
        return Outcome(
            Verb.DISCARD,
            unit.id,
            Result.NO_PERMISSION,
            cause=f"cannot write the drop-in {error.filename}: {error.strerror}",
            remedy="run the command as root, with sudo for instance",
        )


def _start(
    systemd: Systemd, unit: Unit, parked: int, timeout: float | None, progress: Progress, since: int
) -> Outcome:
    image = f"image of generation {parked}" if parked else "image"
    systemd.reset_failed(unit.id)
    # Not start: that would wait for the next automatic restart.
    job = systemd.restart(unit)
    progress(f"{unit.id}: systemd starts it without the {image} (job {job})")
    try:
        _, now = follow(systemd, unit, job, timeout, progress)
    except JobConflict:
        raise
    except UnitError as error:
        now = systemd.unit(unit.id)
        if not now.serves:
            return Outcome.of_error(Verb.DISCARD, unit.id, error, Result.NOT_SERVING)
    after = Status.parse(now.status_text) if now.serves else None
    if not now.serves:
        why = cause.cause(cause.read(unit.id, since), now).text
        return Outcome(
            Verb.DISCARD, unit.id, Result.NOT_SERVING, cause=why, remedy=what_to_do(systemd, now)
        )
    if after is not None and after.source_generation is not None:
        return Outcome(
            Verb.DISCARD,
            unit.id,
            Result.OLD_SERVES,
            cause=f"it loaded the image all the same: {after}",
            remedy=f"see: journalctl -u {unit.id}",
            after=after,
        )
    says = f": {after}" if after else ""
    return Outcome(
        Verb.DISCARD, unit.id, Result.DONE, done=f"started without the {image}{says}", after=after
    )


@contextlib.contextmanager
def _drop_in(systemd: Systemd, unit: Unit, generation: str) -> Iterator[None]:
    """The drop-in that names what to leave out; gone again afterwards, whatever happens."""
    path = DROP_IN.format(unit=unit.id)
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write(f"[Service]\nEnvironment={VARIABLE}={generation}\n")
        systemd.daemon_reload(unit.id)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(directory)  # only if nothing else is in it
            systemd.daemon_reload(unit.id)
