# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put together what an instance is made of, whatever its loop, and end it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from upgrader.errors import BindError, DeclarationError, UpgradeError
from upgrader.instance.control import Answering
from upgrader.instance.destination_side import DestinationSide
from upgrader.instance.fork_guard import keep_from_children, share_again
from upgrader.instance.notify_relay import NotifyRelay
from upgrader.instance.process import make_room_for_fds, watchdog_span
from upgrader.instance.self_report import SelfReport
from upgrader.instance.turns import Turns
from upgrader.protocol.kinds import Kind, Standing
from upgrader.protocol.later import later
from upgrader.protocol.parameters import Parameters
from upgrader.systemd.cgroup import own_unit
from upgrader.systemd.fdstore import FdStore
from upgrader.systemd.listen_fds import own_number

if TYPE_CHECKING:
    from upgrader.instance import children, replacement, source_side, unit_signals
    from upgrader.systemd import journal
else:
    children = later("upgrader.instance.children")
    replacement = later("upgrader.instance.replacement")
    source_side = later("upgrader.instance.source_side")
    unit_signals = later("upgrader.instance.unit_signals")
    journal = later("upgrader.systemd.journal")

_log = logging.getLogger("upgrader")


class InstanceParts:
    """The parts of one instance; each knows those that are made before it."""

    def __init__(self, service: str, version: str, environment: MutableMapping[str, str]) -> None:
        """Raises DeclarationError in a forked process, ParameterError for a variable that makes no
        sense."""
        main = environment.get("SYSTEMD_EXEC_PID")
        own = own_number(environment)
        if main and environment.get("NOTIFY_SOCKET") and main != own:
            raise _not_main(service, own, main)
        make_room_for_fds()
        self.report = report = SelfReport(service, version, environment)
        self.declarations = report.declarations
        self.turns = Turns()
        self._store = store = FdStore(report.notifier)
        self._watchdog = watchdog_span(environment, own)
        self.answering = Answering(report, environment)
        self.destination = DestinationSide(report, store, self.answering, environment)
        if report.supervised:
            report.unit = own_unit()
            for variable in Parameters.unknown(environment):
                _log.warning("%s is not a parameter of upgrader", variable)
        elif main == own:
            _log.warning(
                "%s: systemd gives it no NOTIFY_SOCKET, so nothing outlives a restart;"
                " set Type=notify, NotifyAccess=exec and FileDescriptorStoreMax= in the unit", service,
            )  # fmt: skip
        else:
            _log.info("%s: not started by systemd, so nothing outlives this process", service)
        self._replacement: replacement.Replacement | None = None
        self._relay: NotifyRelay | None = None
        if report.supervised:
            self._relay = NotifyRelay(report, environment, live=self.destination.live)
        keep_from_children(self._private)
        report.open()

    @functools.cached_property
    def source(self) -> source_side.SourceSide:
        """The part that lives on in another instance, or ends."""
        return source_side.SourceSide(
            self.report, self._store, self.answering, self.destination, self._watchdog
        )

    def open(self, heed: Callable[[unit_signals.UnitSignals], object]) -> None:
        """Be asked by others from now on; at a desk, say where this instance serves.

        `heed` is called in a thread with the signals that the unit names.
        """

        def ask() -> None:
            if self.report.supervised:
                heed(unit_signals.ask_signals(self.report.unit))

        self.answering.open(ask)
        self.report.say_where()

    def replace(self) -> None:
        """Ask for another instance in the place of this one; see `Instance.replace`."""
        if not self.report.since:
            raise DeclarationError("replace()", "is not there before serve() has begun")
        if not self.report.supervised:
            _log.warning("nobody starts another instance: systemd has not started this one")
            return
        self._replacement = self._replacement or replacement.Replacement(
            self.report, lambda: self.answering.negotiation, self._end_by_itself
        )
        self._replacement.ask()

    def _end_by_itself(self, failed: bool) -> None:
        """Park and end, as at a signal by hand."""
        self.source.ends_failed = failed
        os.kill(os.getpid(), signal.SIGTERM)

    def _end_children(self) -> None:
        """What a replaced instance has started ends with it; at a stop, that is PID 1's."""
        report = self.report
        if report.standing is not Standing.DRAINING or self.source.exit_status:
            return
        kept = [item.fd for item in self.declarations.passed]
        ended, killed = children.end_children([*kept, *self.source.outlive])
        if ended:
            how = f", {killed} of them by SIGKILL" if killed else ""
            message = f"generation {report.generation} has ended {ended} processes of its own{how}"
            priority = journal.Priority.WARNING if killed else journal.Priority.INFO
            report.tell(priority, "source", "children", journal.JournalOutcome.DONE, message)

    def _private(self) -> list[int]:
        """FDs that are no business of a forked worker: listeners and connections."""
        listeners = [
            sock.fileno()
            for bound in self.declarations.sockets.values()
            if bound.kind is Kind.LISTENER
            for sock in bound.sockets
        ]
        return listeners + [each.fileno() for _, each in self.report.connections_open()]

    def end(self, error: BaseException | None) -> None:
        """Leave `attach`; ends the process if all of it has moved.

        Without destructors then: no `finally` may say goodbye to a peer that is served elsewhere.
        """
        self.source.end_migration()
        if self.source.successor_lives():
            self.answering.leave_place(self.source.successor_lives)
        self.answering.close()
        if self.source.frozen:
            self._end_children()
            if error is not None:
                _log.error("after serve()", exc_info=error)
                self.source.exit_status = 1
            self.source.tell_strays()
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(self.source.exit_status)
        self.destination.abandon(error)
        for backend in self.declarations.backends.values():
            if not self.report.since or not self.report.supervised:  # nobody else ends a child
                backend.undo()
            backend.close()
        share_again(self._private)
        if self._relay:
            self._relay.close()
        self.report.close()
        # No author has to look into his program because an address is in use: no traceback.
        at_desk = not self.report.supervised
        if isinstance(error, BindError if at_desk else UpgradeError):
            raise SystemExit(f"{self.report.service}: {error}")


def _not_main(service: str, own: str, main: str) -> DeclarationError:
    """The error for a process that the main process has started."""
    remedy = "one instance is one process: use template units instead of forking"
    name = ""
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{main}/exe") != os.readlink("/proc/self/exe"):
            with open(f"/proc/{main}/comm", encoding="utf-8", errors="replace") as file:
                name = f"{file.read().strip()}, "
            remedy = (
                "have ExecStart= start the program itself: with a virtual environment its python,"
                " in a shell with exec"
            )
    what = f"attach() in process {own}, but systemd started {name}process {main}"
    return DeclarationError(service, what, remedy=remedy)
