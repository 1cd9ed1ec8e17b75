# SPDX-License-Identifier: LGPL-2.1-or-later
"""The FD store of the unit: pushing and removing FDs, and the names we use in it.

Every FD gets a name of its own, because FDSTOREREMOVE=1 removes all of one name. FDPOLL=0
everywhere: else PID 1 drops an FD whose other end hangs up.
"""

from __future__ import annotations

import contextlib
from enum import StrEnum

from upgrader.errors import NotifyError
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self

    from upgrader.protocol.identity import HasFileno
    from upgrader.systemd.notify import Notifier


class Stored(StrEnum):
    """What we keep in the FD store; part of the FDNAME."""

    CHANNEL = "channel"  #: a parked image, by generation
    INSURANCE = "insurance"  #: a duplicate without connections, by generation
    ASIDE = "aside"  #: the memfd of an image that could not be loaded, by generation
    LISTENER = "listener"  #: a listener that the service bound itself, by backend
    DATAGRAMS = "datagrams"  #: likewise a datagram socket
    IMAGE = "image"  #: the memfd of an image whose FDs are stored one by one, by generation
    LEDGER = "ledger"  #: what goes with that memfd, by generation
    #: One FD of that image, by generation and number; or what library 0.1.0 must let go of: a further
    #: socket of a backend, by kind, name and number, an FD of another kind, what a program keeps, by
    #: `kept` and name, a further channel, by `channel`, generation and number, or secrets of connections,
    #: by `secrets` and generation.
    ENTRY = "entry"


class StoreName(Value):
    """A name in the FD store: `upgrader-<what>-<item>`."""

    what: Stored
    item: str

    def __str__(self) -> str:
        return f"upgrader-{self.what}-{self.item}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Our name, or None for anybody else's."""
        ours, _, rest = text.partition("-")
        what, _, item = rest.partition("-")
        if ours != "upgrader" or not item or what not in [*Stored]:
            return None
        return cls(Stored(what), item)

    @classmethod
    def of_backend(cls, kind: str, name: str, number: int) -> Self:
        """The name of one socket of a backend, the first one being number 0."""
        if number == 0:
            return cls(Stored(kind), name)
        return cls(Stored.ENTRY, f"{kind}.{name}.{number}")

    @classmethod
    def of_kind(cls, kind: str, name: str, number: int) -> Self:
        """The name of one FD of a backend that is no socket, the first one being number 0."""
        return cls(Stored.ENTRY, f"{kind}.{name}+{number}" if number else f"{kind}.{name}")

    @classmethod
    def of_kept(cls, name: str) -> Self:
        """The name of what a program keeps as `name`."""
        return cls(Stored.ENTRY, f"kept.{name}")

    def further(self, number: int) -> StoreName:
        """The name of the channel that goes on after so many that are full, the first one being this."""
        return StoreName(Stored.ENTRY, f"{self.what}.{self.item}.{number}") if number else self

    @classmethod
    def of_secrets(cls, generation: int) -> Self:
        """The name of what moves with the connections of an image, and may not be in it."""
        return cls(Stored.ENTRY, f"secrets.{generation}")

    @property
    def kept(self) -> str:
        """What the program calls an FD that it keeps, empty for any other FD."""
        what, _, name = self.item.partition(".")
        return name if self.what is Stored.ENTRY and what == "kept" else ""


class FdStore:
    """Pushes to and removes from this unit's FD store; every call waits until PID 1 has done it, unless
    it is told that more follows: PID 1 takes what one process says in its order."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def push(
        self, name: StoreName, fd: HasFileno | socket.socket, *, more_follows: bool = False
    ) -> None:
        """Store one FD; raises NotifyError. PID 1 says nothing when the store is full or off."""
        self._notifier.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
        if not more_follows:
            self._notifier.barrier()

    def remove(self, *names: StoreName | str, more_follows: bool = False) -> None:
        """Remove FDs; names that are not there do no harm. Raises NotifyError."""
        for name in names:
            self._notifier.send(*removal(name))
        if names and not more_follows:
            # A barrier is an FD, and may not be let through. What was sent is done all the same.
            with contextlib.suppress(NotifyError):
                self._notifier.barrier()


def removal(name: StoreName | str) -> tuple[str, str]:
    """The fields that remove an FD, to ride in the same datagram as READY=1."""
    return "FDSTOREREMOVE=1", f"FDNAME={name}"
