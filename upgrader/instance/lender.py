# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a source does for a destination that prepares itself: lends its sockets, and keeps its FDs until
the upgrade is decided. Who may have that is not decided here."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence

from upgrader.errors import UpgradeError
from upgrader.instance import lent_sockets
from upgrader.instance.declarations import Declarations
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.instance.interfaces import Keeper
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno

_MOST = 16  # FDs that are kept for one destination
_CLEAN = 10.0  # seconds to wait until what a refused version has started is gone
_log = logging.getLogger("upgrader")


class Lender:
    """One instance as the source of what a destination needs before Go."""

    def __init__(self, declarations: Declarations, keeper: Keeper) -> None:
        self._declarations = declarations
        self._keeper = keeper
        self._kept: list[str] = []  # for the destination under way, by name
        self._lent: tuple[Fd, ...] = ()  # what `offer` has named
        self._cleaning: threading.Thread | None = None
        self.returned = threading.Event()  #: no destination has anything borrowed
        self.returned.set()

    def begin(self) -> None:
        """Another destination: what was kept for one that has committed is its own."""
        self._kept = []

    def offer(self, others: Sequence[DeclaredBackend] = ()) -> dict[str, list[str]]:
        """The names of what is lent from now on: the sockets, what the program keeps, and `others`,
        backends that are no sockets."""
        declared = self._declarations
        bounds, kept = declared.sockets.values(), declared.kept
        sockets = [(bound.name, sock) for bound in bounds for sock in bound.sockets]
        for fd in self._lent:
            fd.close()
        # What is kept may be given up before it is sent.
        owners: list[HasFileno] = [sock for _, sock in sockets]
        owners += [item.fd for item in kept]
        further = [(each.name, fd) for each in others for fd in each.fds]
        owners += [fd for _, fd in further]
        self._lent = tuple(Fd(os.dup(each.fileno())) for each in owners)
        return {
            "backends": [name for name, _ in sockets],
            "kept": [item.name for item in kept],
            "others": [name for name, _ in further],
        }

    def send(self, sock: socket.socket) -> None:
        """Send what was named last; raises OSError."""
        lent, self._lent = self._lent, ()
        try:
            lent_sockets.lend(sock, lent)
        finally:
            for fd in lent:
                fd.close()

    def keep(self, name: str, fd: Fd) -> str:
        """Keep an FD for the destination; nothing, or why that cannot be done."""
        if len(self._kept) >= _MOST:
            return f"{_MOST} are kept already"
        if any(item.name == name for item in self._declarations.passed):
            return "the running instance has one of that name"
        try:
            self._keeper.keep(name, fd)
        except UpgradeError as error:
            return str(error)
        self._kept.append(name)
        return ""

    def give_up(self) -> None:
        """The upgrade has failed: begin to see to it that nothing is left of what was kept."""
        if kept := self._kept:
            self._kept = []
            self._cleaning = threading.Thread(
                target=self._clean, args=(kept,), name="upgrader-refused", daemon=True
            )
            self._cleaning.start()

    def wait_clean(self) -> None:
        """Wait until that is done, but not for ever."""
        if cleaning := self._cleaning:
            cleaning.join(_CLEAN)

    def _clean(self, names: Sequence[str]) -> None:
        items = [item for item in self._declarations.passed if item.name in names]
        for callback in self._declarations.refusals:
            try:
                callback(items)
            except Exception:
                _log.exception("%s failed", callback.__qualname__)
        for name in names:
            with contextlib.suppress(UpgradeError):
                self._keeper.forget(name)
