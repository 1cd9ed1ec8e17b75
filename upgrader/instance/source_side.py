# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance as the source: it gives everything away, parks it, or takes it back when it ends.

It never loads anything; `destination_side` does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upgrader.codes import Code
from upgrader.errors import BusyWork, UpgradeError
from upgrader.instance.control import Answering
from upgrader.instance.declared_socket import Bound
from upgrader.instance.destination_side import DestinationSide
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.collector import no_collection
from upgrader.protocol.kinds import Standing
from upgrader.protocol.later import later
from upgrader.protocol.parameters import Mechanism
from upgrader.systemd.fdstore import FdStore, Stored, StoreName

if TYPE_CHECKING:  # loaded by the instances that migrate live
    import msgspec

    from upgrader.instance import frozen, rounds, save
    from upgrader.instance.copying import Copying
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.frozen import Frozen, Moving
    from upgrader.instance.interfaces import Loop
    from upgrader.instance.live_source import LiveSource, MigrationRequest
    from upgrader.protocol import identity, image, phase, switchover
    from upgrader.protocol.fd import Fd
    from upgrader.systemd import journal, own_unit
else:
    msgspec = later("msgspec")
    phase = later("upgrader.protocol.phase")
    frozen = later("upgrader.instance.frozen")
    rounds = later("upgrader.instance.rounds")
    save = later("upgrader.instance.save")
    image = later("upgrader.protocol.image")
    identity = later("upgrader.protocol.identity")
    switchover = later("upgrader.protocol.switchover")
    own_unit = later("upgrader.systemd.own_unit")
    journal = later("upgrader.systemd.journal")

_TO_PARK = 2.0  # seconds of TimeoutStopSec= in which nothing is waited for any more
_GRACE = 1.0  # seconds for the program's own end, however late it is
_TO_EXIT = 0.1  # seconds before PID 1 would send SIGKILL
_log = logging.getLogger("upgrader")


class SourceSide:
    """The part of an instance that lives on in another one, or ends."""

    def __init__(
        self,
        report: SelfReport,
        store: FdStore,
        answering: Answering,
        destination: DestinationSide,
        watchdog: float,
    ) -> None:
        """`destination`: what this instance was loaded by; `watchdog`: WatchdogSec= in seconds, or 0."""
        self.frozen = False  #: everything has moved; nothing here touches it any more
        self.exit_status = 0  #: of the process, once everything has moved
        self.ends_failed = False  #: if it ends by itself, systemd shall take that for a failure
        self.outlive: list[Fd] = []  #: pidfds of processes that do not end with this one
        self._held_at: int | None = None
        self._deadline = self._killed = float("inf")  # of a stop: all is held, PID 1 sends SIGKILL
        self.report = report
        self.declarations = report.declarations
        self.store = store
        self.answering = answering
        self.destination = destination
        self._migration: LiveSource | None = None
        self.watchdog = watchdog

    @property
    def held(self) -> bool:
        """Whether new work is held, before a freeze."""
        return self._held_at is not None

    def holds(self, held: bool) -> None:
        """New work is held from now on, or not any more: the pause counts from there."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._held_at = (self._held_at or now) if held else None

    # To another process, or to what this one becomes

    def copy(self, request: MigrationRequest, loop: Loop) -> Copying | None:
        """Begin to copy tables to a destination that is ready, while this instance serves; None if
        there are none that it takes in rounds."""
        from upgrader.instance.copying import Copying

        negotiation = self.answering.negotiation
        copied = rounds.Rounds.of(self.declarations, negotiation.offer) if negotiation else None
        if copied is None:
            return None
        parameters = self.report.parameters
        self._migration = migration = self._begin(request, loop, copied)
        migration.side.feed(switchover.Event.COPY)
        return Copying(
            migration, copied, limit=parameters.downtime_limit,
            timeout=parameters.migration_timeout / 2, bandwidth=parameters.max_bandwidth,
            tell=lambda copied: self.report.progress.enter(
                phase.Phase.COLLECTING, round=copied.round, copied=copied.bytes, left=copied.left
            ),
        )  # fmt: skip

    def copied(self, copying: Copying) -> bool:
        """Nothing more is copied while this instance serves: whether the freeze may come. If not, it
        serves on, and has said why."""
        if copying.event and self._migration:
            self._migration.side.feed(copying.event)
            self._migration = None
        return copying.event is None

    def _begin(
        self, request: MigrationRequest, loop: Loop, copied: rounds.Rounds | None = None
    ) -> LiveSource:
        from upgrader.instance.live_source import LiveSource
        from upgrader.instance.source_steps import SourceSteps

        parameters = self.report.parameters
        return LiveSource(
            request,
            SourceSteps(self, loop, copied),
            limit=parameters.downtime_limit,
            timeout=parameters.migration_timeout,
            beat=self.watchdog / 2 if self.watchdog else float("inf"),
        )

    def give(self, request: MigrationRequest, loop: Loop) -> LiveSource:
        """Give everything to a destination that is ready, up to its Ack, or serve on.

        Run where nothing else of this instance runs. Afterwards it is SERVING, or COMMITTED: then
        its next events are still to be fed.
        """
        self.report.standing = Standing.MIGRATING
        self._migration = migration = self._migration or self._begin(request, loop)
        with no_collection():
            if migration.give() is switchover.Source.SERVING:
                self._migration = None
        return migration

    def end_migration(self) -> None:
        """End a migration that was left in the middle, once PID 1 knows whom it has."""
        if self._migration:
            self._migration.settle()
            if self._migration.state is switchover.Source.RETIRED:
                self._migration.side.feed(switchover.Event.STOP)

    def successor_lives(self) -> bool:
        """Whether another process has taken over, and runs."""
        return self.frozen and self._migration is not None and self._migration.successor_lives

    def execute(self, execution: Execution, loop: Loop) -> None:
        """Become the new version; returns only if that fails, and this instance serves on.

        Run where nothing else of this instance runs.
        """
        from upgrader.instance.exec_mode import ExecutionError, become

        report = self.report
        report.standing = Standing.MIGRATING
        report.progress.enter(phase.Phase.FROZEN)
        command = execution.command
        manifest = None
        try:
            with no_collection():
                moving, busy = loop.freeze()
                connections = frozen.spread(moving)
                secrets = save.secrets(report.generation, connections)
                manifest, fds = self.build(connections, busy)
                for item in manifest.left_behind[:20]:
                    _log.warning("left behind: %s of %r: %s", item.what, item.backend, item.why)
                message = f"generation {report.generation} becomes {' '.join(command.arguments)}"
                report.done("source", "migrate", message)
                name = StoreName(Stored.CHANNEL, str(report.generation))
                store = self.store if report.supervised else None
                beyond = self.declarations.beyond_image()
                beyond += [(str(name), fd) for name, fd in secrets]
                become(execution, manifest, fds, beyond, name, store, report.unit)
        except (UpgradeError, OSError) as error:
            code = Code.SOURCE_FAILED
            if isinstance(error, ExecutionError | BusyWork):
                code = error.code
            if manifest:
                self.guard(manifest)
            execution.failed.set_result(self.serve_on(code, str(error)))
            loop.resume()

    def build(
        self,
        connections: Sequence[Frozen],
        busy: Sequence[image.LeftBehind],
        readers: save.Readers | None = None,
        *,
        partial: bool = False,
        beyond: Sequence[tuple[str, identity.HasFileno]] = (),
        copied: rounds.Rounds | None = None,
    ) -> tuple[image.Manifest, list[identity.HasFileno]]:
        """`readers`: what the destination has said that it can read; `partial`: leave behind what
        cannot be saved; `beyond`: what PID 1 would pass to a start besides, by its FDNAME; `copied`:
        what has copied tables."""
        report = self.report
        return save.build(
            self.declarations, report.generation, report.version, connections, busy, report.overrides,
            readers or save.Readers(), partial=partial, beyond=beyond, withheld=self._withheld(),
            held_at=self._held_at, rounds=copied,
        )  # fmt: skip

    def _withheld(self) -> list[str]:
        """The backends that are no sockets and do not move."""
        return [n for n in self.declarations.backends if not self.answering.crosses(n)]

    def guard(self, manifest: image.Manifest) -> None:
        """Nothing was given away: what the other process may have changed is set again."""
        for name, described in (manifest.backends or {}).items():
            self.declarations.backends[name].serve_on(described)

    def serve_on(self, code: Code, why: str) -> str:
        """Report that nothing was given away; returns why, as it is told."""
        assert self.answering.negotiation is not None
        report = self.report
        report.standing = Standing.SERVING
        code, reason = self.answering.negotiation.over(code, why)
        message = f"generation {report.generation} serves on: {reason}"
        if code is Code.PREFLIGHT_PASSED:
            report.done("source", "migrate", message)
        else:
            report.failed("source", "migrate", message)
        return reason

    # The end

    def told_to_stop(self, *, failed: bool = False) -> tuple[bool, float]:
        """Find out how to end: (whether to park, by when all must be held, as of `time.monotonic`).

        At a desk, with UPGRADER=off, and where no job and no Restart= starts another instance, a
        stop is for good; so it is where no bus is to be seen, and no restart was announced.
        `failed`: this instance ends by itself, with a failure. Two seconds, or a
        fifth, of TimeoutStopSec= are kept for parking itself, before PID 1 sends SIGKILL.
        """
        report = self.report
        report.standing = Standing.STOPPING
        self.destination.wait_settled()
        stop = own_unit.StopJob(own_unit.StopReason.STOP, float("inf"))
        if report.supervised:
            with self.destination.lent():
                stop = own_unit.ask(report.unit, failed=failed or self.ends_failed)
            if failed or (self.ends_failed and stop.reason is own_unit.StopReason.NO_JOB):
                self.exit_status = 1
            deaf = stop.reason is own_unit.StopReason.UNKNOWN and report.bus_hidden
            if deaf and not failed and not self.answering.restart_announced:
                stop = stop.replace(reason=own_unit.StopReason.STOP)
        with contextlib.suppress(UpgradeError):
            report.notifier.send("STOPPING=1")
        parameters = report.parameters
        parks = parameters.enabled and stop.reason is not own_unit.StopReason.STOP
        patience = parameters.drain_timeout + (parameters.downtime_limit if parks else 0)
        now = time.monotonic()
        held = now + min(patience, max(stop.timeout - _TO_PARK, stop.timeout * 0.8))
        self._deadline, self._killed = held, now + stop.timeout
        return parks, held

    def park(
        self,
        moving: Sequence[Moving],
        busy: Sequence[image.LeftBehind],
        turns: Sequence[str],
    ) -> bool:
        """Park everything; False (and said so) if that cannot be done and must be drained. `turns`:
        names of those that run still, and end with this process.

        Run where nothing else of this instance accepts connections: what is given back here is taken
        by nobody else.
        """
        report = self.report
        self.answering.close()
        self.destination.give_back()
        why = "it did not end within drain-timeout, and is cut"
        busy = [*busy, *(image.LeftBehind(name, "turn", why) for name in turns)]
        secrets: list[tuple[StoreName, Fd]] = []
        try:
            with no_collection():
                connections = frozen.spread(moving)
                secrets = save.secrets(report.generation, connections)
                for name, fd in secrets:
                    self.store.push(name, fd)
                manifest, fds = self.build(connections, busy, partial=True)
                outcome = save.keep(
                    manifest, fds, self.store, report.unit,
                    one_by_one=report.parameters.mechanism is Mechanism.FD_STORE,
                    there={n for n, b in self.declarations.backends.items() if b.kind.persistent},
                )  # fmt: skip
        except (UpgradeError, OSError) as error:
            with contextlib.suppress(UpgradeError):
                self.store.remove(*(name for name, _ in secrets))
            message = f"nothing could be parked, draining instead: {error}"
            report.failed("source", "park", message)
            return False
        message = (
            f"generation {report.generation} parked: {outcome.fds} FD{'s' * (outcome.fds != 1)}"
        )
        for item in outcome.left_behind[:20]:
            message += f"\nleft behind: {item.what} of {item.backend!r}: {item.why}"
        if outcome.left_behind:
            message += f"\n{len(outcome.left_behind)} left behind in all"
        priority = journal.Priority.ERR if manifest.unsaved or turns else journal.Priority.INFO
        report.tell(priority, "source", "park", journal.JournalOutcome.DONE, message)
        self.store.remove(
            *(n for w in self._withheld() for n in self.declarations.backends[w].stored_names)
        )
        self.retire(manifest)
        self._end_in_time()
        return True

    def retire(self, manifest: image.Manifest) -> None:
        """The states are another instance's, as they are in this image."""
        given = {state.name: state for state in manifest.states}
        for name, declared in self.declarations.states.items():
            declared.retire(given.get(name))
        for name in manifest.backends or ():
            self.declarations.backends[name].retire()

    def tell_strays(self) -> None:
        """Say which states were written to after they had been given away."""
        for name, declared in self.declarations.states.items():
            if declared.was_written:
                self.report.failed(
                    "source", "stray",
                    f"state {name!r} was written to after it had been given away, so that is lost: have"
                    " whatever writes to it take a turn, and look whether it is the owner still",
                )  # fmt: skip

    def _end_in_time(self) -> None:
        """Everything is parked, and nobody serves before this process is gone: what the program does
        at its end may take what is left of the time to stop, and a second at least."""
        now = time.monotonic()
        seconds = min(max(self._deadline - now, _GRACE), self._killed - now - _TO_EXIT)

        def end() -> None:
            message = (
                "everything is parked, and the program has not ended by itself in time"
                f" ({seconds:.1f} s): this process ends now"
            )
            self.report.tell(
                journal.Priority.ERR, "source", "park", journal.JournalOutcome.DONE, message
            )
            os._exit(self.exit_status)

        timer = threading.Timer(max(seconds, 0), end)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """A stop for good: close the listeners and take all of ours out of the FD store.

        A listener that PID 1 keeps with nobody behind it makes clients hang, not be refused.
        """
        names = [
            name for bound in self.declarations.sockets.values() for name in bound.stored_names
        ]
        for backend in self.declarations.backends.values():
            names += backend.stored_names
        names += [self.destination.insurance] if self.destination.insurance else []
        try:
            self.store.remove(*names)
        except UpgradeError as error:
            _log.warning("%s", error)
        for bound in self.declarations.sockets.values():
            _unlink(bound)
            bound.close()


def _unlink(bound: Bound) -> None:
    """Remove the socket file of a listener that we bound, if it is still ours to remove."""
    for address in bound.addresses if bound.persistent else ():
        if isinstance(address.name, str) and address.name[0] == "/":
            with contextlib.suppress(OSError):
                os.unlink(address.name)
