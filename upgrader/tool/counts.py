# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many upgrades of a unit were done, and how many failed, of those that this tool was asked for,
and how the last one went.

In a file a unit, of root's upgrades only; what goes by `systemctl reload` or `restart` alone is not
counted, but shows as a generation, or as a hold.
"""

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Migration

PLACE = Path("/var/lib/upgrader/count")


class Counts(msgspec.Struct, frozen=True):
    """Since the file was made, or since somebody removed it."""

    done: int = 0
    failed: int = 0
    last: Migration = Migration()


def read(unit: str, place: Path = PLACE) -> Counts:
    """The counts of a unit; all 0 where there are none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return msgspec.json.decode((place / unit).read_bytes(), type=Counts)
    return Counts()


def add(unit: str, last: Migration, place: Path = PLACE) -> None:
    """Count one more, which was done or has failed; nothing where this user may not write."""
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held for the next lines only, and root's
            now = read(unit, place)
            done = last.phase is Phase.DONE
            now = Counts(now.done + done, now.failed + (not done), last)
            beside = place / f".{unit}"
            beside.write_bytes(msgspec.json.encode(now) + b"\n")
            beside.rename(place / unit)
        finally:
            os.close(lock)
