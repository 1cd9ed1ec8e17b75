# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance knows of itself and tells others: where it stands, its parameters, its phases.

It owns no backend and moves nothing; the two sides of an instance do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from upgrader.errors import ParameterError, UpgradeError
from upgrader.instance.declarations import Declarations
from upgrader.protocol.kinds import Standing, show_address
from upgrader.protocol.later import later
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.status_text import Origin, Status
from upgrader.systemd.notify import Notifier, one_line

if TYPE_CHECKING:
    from upgrader.instance import phases, watched_files
    from upgrader.instance.gap import Gap
    from upgrader.instance.interfaces import Open
    from upgrader.protocol import phase, varlink_types
    from upgrader.systemd import journal
    from upgrader.systemd.unit_settings import Settings
else:
    phase = later("upgrader.protocol.phase", loading=True)
    phases = later("upgrader.instance.phases", loading=True)
    varlink_types = later("upgrader.protocol.varlink_types", loading=True)
    watched_files = later("upgrader.instance.watched_files")
    journal = later("upgrader.systemd.journal", loading=True)

_TRIAL = 1.0  # seconds up to which a trial of the states is worth its time
_log = logging.getLogger("upgrader")


class SelfReport:
    """The part of an instance that others ask for, and that it tells them."""

    def __init__(self, service: str, version: str, environment: Mapping[str, str]) -> None:
        self.service = service
        self.version = version
        self.unit = ""
        self.generation = 0  #: 1 on a cold start, one more with each migration; 0 before `serve`
        self.since = 0.0  #: seconds since the epoch at which it became the owner
        self.standing = Standing.SERVING
        self.gap: Gap | None = None  #: since the freeze, in which datagrams may have been dropped
        self.tls_memory = ""  #: the kind in which the keys of TLS connections cross, if they do
        #: An upgrade begins with a preflight, if nobody says otherwise.
        self.preflight_first = False
        self.drains_until = 0.0  #: seconds since the epoch, once another instance owns everything
        self._configured = Parameters.from_environment(environment)
        self.parameters = self._configured
        self.overrides: dict[str, str] = {}
        #: The last version that did not take over, by its own fault.
        self.refusal: varlink_types.Refusal | None = None
        #: Of the unit at the start of this process; None as long as PID 1 was not asked.
        self.settings: Settings | None = None
        #: Asks PID 1 for them; there as soon as that was done once.
        self.ask_settings: Callable[[], Settings] | None = None
        #: What takeover has said of them; None if PID 1 has made this process.
        self.made_from: str | None = None
        self._began = time.monotonic_ns()
        self.declarations = Declarations(service)
        self.notifier = Notifier.from_environment(environment)
        self.notify_socket = environment.get("NOTIFY_SOCKET", "")  #: PID 1's own
        self.supervised = self.notifier.connected  #: systemd started this process
        #: All open connections with their backend; called from any thread.
        self.connections_open: Callable[[], Sequence[tuple[str, Open]]] = lambda: ()
        #: The programs of a runner, and how many connections a listener has that others accept from; called
        #: from any thread.
        self.programs: Callable[[], list[varlink_types.RunProgram]] = list
        self.connections_of: Callable[[str], int] | None = None
        #: What has become of handlers that begin anew; called from any thread.
        self.replays: Callable[[], varlink_types.ReplayCounts] | None = None
        self._status = Status(0, Origin.COLD)
        self._upgrade = ""  # the id of the one that has brought this instance here
        self._stayed: Mapping[str, int] = {}  # how many were left behind, by the reason
        self._progress: phases.Phases | None = None
        self._watched: watched_files.WatchedFiles | None = None
        self._lock = threading.Lock()
        self._prefix = _Prefix(self)

    def open(self) -> None:
        """From now on, lines in the log are this instance's, and say so."""
        _log.addFilter(self._prefix)

    def close(self) -> None:
        """Say nothing more."""
        _log.removeFilter(self._prefix)
        self.notifier.close()

    # What others ask for

    @property
    def progress(self) -> phases.Phases:
        """The migration under way, or the last one."""
        with self._lock:
            if self._progress is None:
                self._progress = phases.Phases()
                if self.since:
                    self._remember(self._progress)
            return self._progress

    def hears_systemd(self) -> bool:
        """Whether PID 1 can be asked. One that did not answer at the start of this process, when it may
        have been executing itself anew, is asked once more, for seconds at most."""
        if self.ask_settings and self.settings and not self.settings.heard:
            self.settings = self.ask_settings()
        return self.settings is None or self.settings.heard

    @property
    def bus_hidden(self) -> bool:
        """Whether there is no bus for this process, and PID 1 could not be asked otherwise."""
        return self.settings is not None and not self.settings.heard and self.settings.hidden

    @property
    def speaks(self) -> bool:
        """Whether PID 1 may hear what its program says: no other instance has replaced this one."""
        return self.standing is not Standing.DRAINING

    @property
    def watched(self) -> watched_files.WatchedFiles:
        """The files that this process was made of."""
        with self._lock:
            if self._watched is None:
                self._watched = watched_files.WatchedFiles(self._began)
            return self._watched

    def override(self, parameters: Mapping[str, str]) -> None:
        """Set parameters until the service is stopped, whatever the unit says; an empty value takes
        back what was set. Raises ParameterError, and sets none then."""
        overrides = {n: v for n, v in {**self.overrides, **parameters}.items() if v}
        self.parameters = self._configured.updated(overrides, self.declarations.names)
        self.overrides = overrides

    def try_states(self) -> list[varlink_types.Trial]:
        """Find out which states can be saved as they are now, from any thread, and say which cannot:
        an upgrade would fail, and a restart would lose them."""
        trials = []
        for declared in list(self.declarations.states.values()):
            before = declared.trial
            trial = declared.try_saving()
            trials.append(trial)
            if trial.problem and (before is None or before.problem != trial.problem):
                self._tell_unsavable(trial)
            elif self._about(trial) and (
                before is None or self._about(before) != self._about(trial)
            ):
                _log.warning("state %r %s", trial.name, self._about(trial))
        return trials

    def unsavable(self) -> str:
        """What this instance could not give away now, for people; nothing if a trial is too costly,
        because the freeze will tell."""
        declared = self.declarations.states.values()
        if sum(each.trial.seconds for each in declared if each.trial) > _TRIAL:
            return ""
        problems = [each for each in self.try_states() if each.problem]
        return "; ".join(f"state {p.name!r} cannot be saved: {p.problem}" for p in problems)

    @staticmethod
    def _about(trial: varlink_types.Trial) -> str:
        """What a trial has found that refuses no upgrade, for people."""
        if trial.unreadable:
            return f"could not be loaded again by the version that runs: {trial.unreadable}"
        return f"would not be loaded as it is: {', '.join(trial.altered)}" if trial.altered else ""

    @property
    def unreadable(self) -> str:
        """Which states this very version could not load again, for people."""
        return "; ".join(
            f"state {trial.name!r} {self._about(trial)}"
            for trial in self.try_states()
            if trial.unreadable
        )

    def inherit(self, overrides: Mapping[str, str]) -> None:
        """Take over what was set on the instance before; what this version does not know is left."""
        for name, value in overrides.items():
            try:
                self.override({name: value})
            except ParameterError as error:
                _log.warning("not inherited: %s", error)

    # What it tells

    def say_where(self) -> None:
        """At a desk, say where it serves: no systemd can be asked. Only a terminal is told."""
        if self.supervised or not sys.stderr.isatty():
            return
        bounds = self.declarations.sockets.values()
        names = [sock.getsockname() for bound in bounds for sock in bound.sockets]
        where = "".join(f" on {show_address(name)}" for name in names)
        print(f"{self.service}: serves{where}; Ctrl-C stops it", file=sys.stderr)

    def refused(self, why: str, refusal: varlink_types.Refusal | None) -> None:
        """Show, in the status text, why a newer version has not taken over; `refusal` if that was
        its own fault."""
        self.refusal = refusal or self.refusal
        self._status = self._status.replace(refused=one_line(why))
        with contextlib.suppress(UpgradeError):
            self.notifier.send(f"STATUS={self._status.status_text}")

    def loaded(self, status: Status, upgrade: str, stayed: Mapping[str, int]) -> None:
        """Say that this instance is the owner now, and what has brought it here: the upgrade with
        the id `upgrade`, if any; `stayed`: how many were left behind, by the reason."""
        self._status, self._upgrade, self._stayed = status, upgrade, stayed
        if self._progress:
            self._remember(self._progress)
        self.done("destination", "load", status.status_text)

    def _remember(self, progress: phases.Phases) -> None:
        status = self._status
        pause = status.pause or 0.0
        loaded = varlink_types.Loaded(
            origin=status.origin,
            source=status.source_generation or 0,
            fds=status.fds,
            bytes=status.state_bytes,
            left_behind=status.left_behind,
            set_aside=status.set_aside or 0,
            pause=pause,
            dropped=list(status.dropped),
            unsaved=list(status.unsaved),
            datagrams_lost=status.datagrams_lost,
            stayed=dict(self._stayed),
        )
        migration = None
        if status.source_generation is not None:
            migration = varlink_types.Migration(
                phase.Phase.DONE,
                mode=status.origin,
                source=status.source_generation,
                destination=status.generation,
                pid=os.getpid(),
                began=round(self.since - pause, 3),
                seconds=pause,
                pause=pause,
                fds=status.fds,
                bytes=status.state_bytes,
                left_behind=status.left_behind,
            )
        progress.loaded(loaded, migration, self._upgrade)

    @property
    def _identifier(self) -> str:
        return self.settings.identifier if self.settings else ""

    def _tell_unsavable(self, trial: varlink_types.Trial) -> None:
        message = (
            f"state {trial.name!r} cannot be saved: {trial.problem}; until it can, no upgrade works,"
            " and a restart begins without it"
        )
        if self.supervised:
            journal.report(
                message, journal.Priority.ERR, unit=self.unit, generation=self.generation, side="source",
                phase="trial", outcome=journal.JournalOutcome.FAILED, message_id=journal.UNSAVABLE_ID,
                identifier=self._identifier,
            )  # fmt: skip
        else:
            _log.error("%s", message)

    def done(self, side: str, phase: str, message: str) -> None:
        """Say that a phase of a migration has ended well."""
        self.tell(journal.Priority.INFO, side, phase, journal.JournalOutcome.DONE, message)

    def failed(self, side: str, phase: str, message: str) -> None:
        """Say that a phase of a migration has failed."""
        self.tell(journal.Priority.ERR, side, phase, journal.JournalOutcome.FAILED, message)

    def tell(
        self,
        priority: journal.Priority,
        side: str,
        phase: str,
        outcome: journal.JournalOutcome,
        message: str,
    ) -> None:
        """Send a journal entry; at a desk, log what has failed."""
        if self.supervised:
            details = {}
            # What is parked has no destination yet: the last migration is the one before.
            if phase != "park" and (self._progress or self._status.source_generation is not None):
                news, last = self.progress.now, self.progress.last
                if news.mode:
                    details = {**phases.fields(news), "ID": last.id, "CODE": last.code}
            journal.report(
                message, priority, unit=self.unit, generation=self.generation, side=side,
                phase=phase, outcome=outcome, details={n: v for n, v in details.items() if v},
                identifier=self._identifier,
            )  # fmt: skip
        elif priority is journal.Priority.ERR:
            _log.error("%s", message)


class _Prefix(logging.Filter):
    """Says in each line that the library logs which generation says it: of two instances that run
    side by side, both write to the journal of one unit."""

    def __init__(self, report: SelfReport) -> None:
        super().__init__()
        self._report = report

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass, with the generation before it; 0 until it is known."""
        generation = self._report.generation or self._report.declarations.generation
        record.generation = generation
        if generation:
            record.msg = f"generation {generation}: {record.msg}"
        return True
