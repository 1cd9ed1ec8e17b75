# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keep in /run what hooks were asked to upgrade, and what came of it last.

Many may ask for one unit at the same time: a package, a library it uses, needrestart. Each leaves
a request; who gets the lock claims all that are there, and the others find theirs served. A claim
whose owner was killed is there for the next one. Only root can open any of these files: whoever can
open a lock can hold it.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO

import msgspec

from upgrader.errors import UpgradeError

#: Emptied by a boot, and then every service runs what is on disk.
PLACE = Path("/run/upgrader/hook")
#: Seconds between two looks at a lock: flock(2) knows no deadline.
_LOOK = 0.05


class TurnTaken(UpgradeError):
    """Somebody else has been upgrading `unit` on request for all the `seconds` that were waited."""

    def __init__(self, unit: str, seconds: float) -> None:
        super().__init__(f"{unit}: another request has been upgrading it for {seconds:g}s")
        self.unit = unit
        self.seconds = seconds


class AskedBy(StrEnum):
    """Why an upgrade is asked for."""

    INSTALLED = "installed"  #: a new version of the service is on disk
    STALE = "stale"  #: something that it uses was replaced, as needrestart finds out


class Served(msgspec.Struct, frozen=True):
    """The last upgrade on request: when it ended (CLOCK_MONOTONIC), and how."""

    ended: float
    done: bool
    line: str


class QueueTurn:
    """The right to upgrade one unit on request, while its lock is held."""

    def __init__(self, place: Path, unit: str) -> None:
        self._filed = place / "filed" / unit
        self._claimed = place / "claimed" / unit
        self._last = place / "last" / unit

    @property
    def origins(self) -> frozenset[AskedBy]:
        """Why, by all who ask; empty if everything asked for has been served."""
        words: set[str] = set()
        for path in (self._filed, self._claimed):
            with contextlib.suppress(FileNotFoundError):
                # A request is the file; a word that a later version writes is no reason to lose it.
                words |= {AskedBy.STALE, *path.read_text(errors="replace").split()}
        if AskedBy.INSTALLED in words:
            return frozenset((AskedBy.INSTALLED,))
        return frozenset((AskedBy.STALE,)) if words else frozenset()

    @property
    def last(self) -> Served | None:
        """What came of the last request."""
        with contextlib.suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError):
            return msgspec.json.decode(self._last.read_bytes(), type=Served)
        return None

    def claim(self) -> None:
        """All requests of now are served by what begins now; those that come later are not."""
        with contextlib.suppress(FileNotFoundError):
            # Left by one that was killed: its word counts as well.
            before = self._claimed.read_text(errors="replace")
            with self._filed.open("a") as file:
                file.write(before)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._filed, self._claimed)

    def served(self, done: bool, line: str) -> None:
        """What was claimed has been dealt with; keep what came of it for who asks as well."""
        served = Served(time.monotonic(), done, line)
        beside = self._last.with_name(f".{self._last.name}")
        beside.write_bytes(msgspec.json.encode(served))
        beside.rename(self._last)
        self.drop()

    def drop(self) -> None:
        """What was claimed is of no interest any more."""
        self._claimed.unlink(missing_ok=True)


class Requests:
    """All of them; raises OSError where /run cannot be written.

    `patience`: seconds to wait for a turn.
    """

    def __init__(self, place: Path = PLACE, *, patience: float = 300.0) -> None:
        self._place = place
        self._patience = patience
        for name in ("filed", "claimed", "last", "lock"):
            (place / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        # Also where another version, or the script that files requests, has made the directory.
        place.chmod(0o700)

    def file(self, unit: str, origin: AskedBy) -> None:
        """Ask for an upgrade of `unit`, which must be the name of one."""
        # Beside an origin that is there already: one write of one line is never torn.
        with (self._place / "filed" / unit).open("a") as file:
            file.write(f"{origin}\n")

    def units(self) -> list[str]:
        """Those that somebody asks for, and that nobody has served."""
        found = {name for place in ("filed", "claimed") for name in os.listdir(self._place / place)}
        return sorted(found)

    @contextlib.contextmanager
    def turn(self, unit: str) -> Iterator[QueueTurn]:
        """Wait until nobody else upgrades `unit` on request; raises TurnTaken."""
        deadline = time.monotonic() + self._patience
        with (self._place / "lock" / unit).open("w") as lock:
            while not _locked(lock):
                if time.monotonic() > deadline:
                    raise TurnTaken(unit, self._patience)
                time.sleep(_LOOK)
            yield QueueTurn(self._place, unit)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
