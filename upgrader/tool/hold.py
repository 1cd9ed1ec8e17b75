# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read, write and judge holds: why hooks leave a unit alone.

After a failed upgrade the old code runs while a bad version lies on disk, and whatever restarts the
service next would start that one. Such a hold is what failed, since when, and why, in a file if root
made the upgrade, or as a fact of the running instance after a bare `systemctl reload`. It is over as
soon as it is not true any more, whoever did what; whoever reads it judges that.

An admin's hold is of another kind: it lasts until it is released.
"""

import contextlib
import os
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

import msgspec

from upgrader.errors import UpgradeError
from upgrader.protocol.varlink import LARGEST
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.process_start import process_age
from upgrader.systemd.unit import Unit

_SYSTEM = Path("/var/lib/upgrader/hold")


class HoldError(UpgradeError):
    """The hold on a unit cannot be written or released."""


class HoldKind(StrEnum):
    """Who holds a unit, and how that ends."""

    FAILED = "failed"  #: an upgrade failed; over once another version is on disk, or a newer instance serves
    ADMIN = "admin"  #: somebody wants no upgrade; over when it is released
    RELEASED = (
        "released"  #: nobody: what the running instance says of a failure until `since` is over
    )


class Hold(msgspec.Struct, frozen=True):
    """Why `unit` is held, and since when (`since`: seconds of the Unix epoch).

    `fingerprint` names the files of the version that failed, as the instance that ran then saw them;
    empty if nobody could say.
    """

    unit: str
    since: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
    cause: str
    fingerprint: str = ""
    kind: HoldKind = HoldKind.FAILED

    @classmethod
    def now(
        cls, unit: str, cause: str, fingerprint: str = "", kind: HoldKind = HoldKind.FAILED
    ) -> Self:
        """A hold that begins now."""
        return cls(unit, round(time.time(), 3), cause, fingerprint, kind)

    def __str__(self) -> str:
        when = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"held{_BY.get(self.kind, '')}{when if self.since else ''}: {self.cause}"

    def is_over(self, began: float, fingerprint: str) -> bool:
        """Whether it is not true any more.

        `began`: when the instance that serves began to, in seconds of the Unix epoch, 0 if none does;
        `fingerprint`: of what lies on disk now, empty if nobody can say.
        """
        if self.kind is not HoldKind.FAILED:
            return self.kind is HoldKind.RELEASED
        replaced = "" not in (self.fingerprint, fingerprint) and fingerprint != self.fingerprint
        return replaced or began > self.since


_BY = {HoldKind.ADMIN: " by an admin"}


def directory(*, user: bool = False) -> Path:
    """Where holds are kept: one file a unit, of the system or of this user's service manager."""
    if not user:
        return _SYSTEM
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "upgrader", "hold")


def read(unit: str, *, user: bool = False) -> Hold | None:
    """The file of a unit, or None. One that cannot be read is an admin's hold: somebody put it there."""
    path = directory(user=user) / unit
    try:
        hold = msgspec.json.decode(path.read_bytes(), type=Hold)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        return Hold(unit, 0.0, f"{path} cannot be read: {error}", kind=HoldKind.ADMIN)
    return msgspec.structs.replace(hold, unit=unit)


def by_admin(unit: str, *, user: bool = False) -> Hold | None:
    """The hold that an admin has put on a unit, or None."""
    found = read(unit, user=user)
    return found if found is not None and found.kind is HoldKind.ADMIN else None


def on_file(*, user: bool = False) -> list[str]:
    """The units that have a file, true or not."""
    try:
        names = sorted(os.listdir(directory(user=user)))
    except OSError:
        return []
    return [name for name in names if not name.startswith(".")]


def standing(unit: Unit, said: Description | None, *, user: bool = False) -> Hold | None:
    """The hold on a unit that is true now, or None; `said` is what its instance says of itself."""
    found = read(unit.id, user=user)
    refused = said.refused if said else None
    if found and found.kind is HoldKind.ADMIN:
        return found
    released = found.since if found and found.kind is HoldKind.RELEASED else 0.0
    began, on_disk = _began(unit, said), said.fingerprint if said else ""
    holds = [found] if found else []
    if refused and refused.since > released:
        holds.append(Hold(unit.id, refused.since, refused.reason, refused.fingerprint))
    true = [hold for hold in holds if not hold.is_over(began, on_disk)]
    return max(true, key=lambda hold: hold.since, default=None)


def _began(unit: Unit, said: Description | None) -> float:
    """When the instance that serves began to: its start, or its taking over from the one before."""
    if not unit.serves:
        return 0.0
    began = max(unit.active_enter_time / 1e6, said.since if said else 0.0)
    with contextlib.suppress(OSError):
        age = process_age(unit.main_pid)
        began = max(began, time.time() - age)
    return began


def place(hold: Hold, *, user: bool = False) -> None:
    """Put a hold on a unit; raises HoldError. An admin's hold is not replaced by a failure."""
    if hold.kind is HoldKind.FAILED and by_admin(hold.unit, user=user):
        return
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
            f"no hold could be put on {hold.unit}: {error}", remedy=_remedy(error, place)
        ) from error


def lift(unit: str, *, user: bool = False) -> None:
    """Remove what a failure has left, for an upgrade is done; an admin's hold stays. Raises HoldError."""
    if not by_admin(unit, user=user):
        _remove(unit, user)


def release(unit: str, said: Description | None, *, user: bool = False) -> None:
    """End the hold on a unit, of whatever kind; raises HoldError.

    `said` is what its instance says of itself: what that knows of a failure is released as well.
    """
    if said and said.refused.since:
        place(Hold.now(unit, "", kind=HoldKind.RELEASED), user=user)
    else:
        _remove(unit, user)


def _remove(unit: str, user: bool) -> None:
    try:
        os.unlink(directory(user=user) / unit)
    except FileNotFoundError:
        pass
    except OSError as error:
        path = directory(user=user) / unit
        raise HoldError(
            f"the hold on {unit} cannot be released: {path}: {error.strerror}",
            remedy=_remedy(error, path),
        ) from error


def _remedy(error: OSError, path: Path) -> str:
    if isinstance(error, PermissionError):
        return "run the command as root, with sudo for instance"
    return f"look at {path}: something else is in the way there"
