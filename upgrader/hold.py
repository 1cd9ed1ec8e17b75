# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hold that a failed upgrade leaves on a unit; reads, writes and lifts it, and obeys nothing.

After a failed upgrade the old code runs while a bad version lies on disk, and whatever restarts the
service next would start that one. Package hooks and needrestart leave a held unit alone, until an
upgrade succeeds or an admin lifts the hold.
"""

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Self

import msgspec

from upgrader.errors import UpgradeError

_SYSTEM = Path("/var/lib/upgrader/hold")


class HoldError(UpgradeError):
    """The hold on a unit cannot be written or lifted."""


class Hold(msgspec.Struct, frozen=True):
    """Why `unit` is held, and since when (`since`: seconds of the Unix epoch)."""

    unit: str
    since: float
    cause: str

    @classmethod
    def now(cls, unit: str, cause: str) -> Self:
        """A hold that begins now."""
        return cls(unit, round(time.time(), 3), cause)

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"held since {when}: {self.cause}"


def directory(*, user: bool = False) -> Path:
    """Where holds are kept: one file a unit, of the system or of this user's service manager."""
    if not user:
        return _SYSTEM
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "upgrader", "hold")


def read(unit: str, *, user: bool = False) -> Hold | None:
    """The hold on a unit, or None. A file that cannot be read is a hold too: somebody put it there."""
    path = directory(user=user) / unit
    try:
        hold = msgspec.json.decode(path.read_bytes(), type=Hold)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        return Hold(unit, 0.0, f"{path} cannot be read: {error}")
    return msgspec.structs.replace(hold, unit=unit)


def held(*, user: bool = False) -> list[Hold]:
    """All holds there are, by unit."""
    try:
        names = sorted(os.listdir(directory(user=user)))
    except OSError:
        return []
    found = [read(name, user=user) for name in names if not name.startswith(".")]
    return [hold for hold in found if hold is not None]


def place(hold: Hold, *, user: bool = False) -> None:
    """Put a hold on a unit, in place of an earlier one; raises HoldError."""
    place = directory(user=user)
    try:
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Written beside and renamed: nobody ever reads half of it.
        with tempfile.NamedTemporaryFile(dir=place, prefix=".", delete=False) as file:
            try:
                file.write(msgspec.json.encode(hold) + b"\n")
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                os.rename(file.name, place / hold.unit)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
    except OSError as error:
        raise HoldError(
            f"no hold could be put on {hold.unit}: {error}",
            remedy="until a good version is back, do not let anything restart it",
        ) from error


def lift(unit: str, *, user: bool = False) -> bool:
    """Lift the hold on a unit; False if there was none. Raises HoldError."""
    try:
        os.unlink(directory(user=user) / unit)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HoldError(
            f"the hold on {unit} cannot be lifted: {error.strerror}",
            remedy="run the command as root, with sudo for instance",
        ) from error
    return True
