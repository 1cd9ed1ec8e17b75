# SPDX-License-Identifier: LGPL-2.1-or-later
"""What takeover asks before it loads what it needs itself: systemd and the running instance answer
meanwhile."""

from __future__ import annotations

import os
import socket

from upgrader.errors import BusError
from upgrader.protocol.rendezvous import socket_path
from upgrader.systemd import cgroup
from upgrader.systemd.bus import Bus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

#: Seconds for systemd, and for the running instance.
TIMEOUT = 5.0


class FirstQuestions:
    """What the unit is, and what its running instance says of itself; asked once this is made."""

    def __init__(self) -> None:
        self.unit = cgroup.own_unit()
        #: Where the running instance listens; None if the unit says no directory for it.
        self.path = socket_path(os.environ)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        #: Why the running instance cannot be asked.
        self.failed: OSError | None = None
        self._bus = self._ask_systemd()
        if self.path:
            self._ask_instance(self.path)

    def bus(self) -> Bus:
        """The connection on which `properties`, `constants` and `environment` of the unit have been asked for;
        raises BusError."""
        if isinstance(self._bus, BusError):
            raise self._bus
        return self._bus

    def _ask_systemd(self) -> Bus | BusError:
        try:
            bus = Bus(TIMEOUT)
            bus.ask_ahead(self.unit)
        except BusError as error:
            return error
        return bus

    def _ask_instance(self, path: str) -> None:
        from upgrader.protocol.varlink import INTERFACE  # while systemd answers
        from upgrader.protocol.varlink_client import ask

        try:
            self.sock.connect(path)
            ask(self.sock, f"{INTERFACE}.Describe")
        except OSError as error:
            self.failed = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        if not isinstance(self._bus, BusError):
            self._bus.close()
