# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of an instance ask of each other; for type checkers, nothing of it runs."""

from __future__ import annotations

from typing import Protocol

from upgrader.instance.frozen import Moving
from upgrader.protocol import image
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.kinds import Waiting


class Open(Protocol):
    """An open connection, of this library or of another one."""

    def fileno(self) -> int:
        """The number of its FD."""

    @property
    def since(self) -> float:
        """When it was opened here, as of `time.monotonic`."""

    @property
    def waiting(self) -> Waiting | None:
        """Its safe point; None while it is busy."""

    @property
    def what(self) -> str:
        """What it is at, where that is known."""


class Loop(Protocol):
    """What a loop does with its connections, in the order of a migration."""

    def freeze(self) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes.

        Raises BusyWork if that would cut in two what is between two safe points.
        """

    def resume(self) -> None:
        """Serve as if nothing had happened."""

    def give_up(self) -> None:
        """Nothing that has moved is touched any more, and nothing is closed; the rest is drained."""

    def let_go(self) -> None:
        """Close what has moved."""


class Keeper(Protocol):
    """Has PID 1 keep FDs; each call waits for that."""

    def keep(self, name: str, fd: HasFileno) -> None:
        """Keep an FD; raises UpgradeError."""

    def forget(self, name: str) -> None:
        """Give it up; raises UpgradeError."""


class Closeable(Protocol):
    """An FD's owner."""

    def close(self) -> None:
        """Close the FD."""
