# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stands before NOTIFY_SOCKET for the program: what it says reaches PID 1 while it speaks for the unit.

A watchdog or a status text of the program's own goes on as before. A process that owns nothing yet, or
nothing any more, and a child would speak in the name of an instance that serves well.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from upgrader.errors import NotifyError
from upgrader.instance.fork_guard import Fence
from upgrader.instance.process import begin_thread
from upgrader.instance.self_report import SelfReport
from upgrader.systemd.notifications import Notification, notify_socket, take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

VARIABLE = "NOTIFY_SOCKET"


class NotifyRelay:
    """Takes the place of NOTIFY_SOCKET in `environment`, until `close`."""

    def __init__(
        self, report: SelfReport, environment: MutableMapping[str, str], *, live: bool
    ) -> None:
        """`live`: another instance speaks for the unit until this one is the owner. Raises OSError."""
        self._report = report
        self._live = live
        self._environment = environment
        self._pid = os.getpid()
        self._real = environment[VARIABLE]
        # The name says for which service manager it stands: a user's own one is found by that.
        self._sock, name = notify_socket(f"{self._real.lstrip('@')[:60]}.upgrader")
        self._fence = Fence(self._sock)  # a child shall not take what is said here
        self._ended = threading.Event()
        begin_thread(self._relay)
        environment[VARIABLE] = name

    def close(self) -> None:
        """Put back what was there, once all that was said is passed on."""
        self._environment[VARIABLE] = self._real
        self._sock.shutdown(socket.SHUT_RD)  # what is queued is still read
        self._ended.wait()
        self._fence.lift()
        self._sock.close()

    def _relay(self) -> None:
        try:
            while said := take(self._sock):
                if said.sender == self._pid:
                    self._pass_on(said)
                for fd in said.fds:
                    fd.close()
        finally:
            self._ended.set()

    def _pass_on(self, said: Notification) -> None:
        report, fields = self._report, list(said.fields)
        if not report.since:
            # Of a start, PID 1 may hear how it goes, but not that it is over: that is `serve`'s.
            fields = [] if self._live else [field for field in fields if field != "READY=1"]
        if fields and report.speaks:
            with contextlib.suppress(NotifyError):  # nobody waits for an answer
                report.notifier.send(*fields, fds=said.fds)
