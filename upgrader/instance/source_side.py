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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from upgrader.codes import Code
from upgrader.errors import BusyWork, UpgradeError
from upgrader.instance.control import Answering
from upgrader.instance.declared_socket import Bound
from upgrader.instance.destination_side import DestinationSide
from upgrader.instance.process import no_collection, watchdog_span
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.kinds import Standing
from upgrader.protocol.later import later
from upgrader.protocol.parameters import Mechanism
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.journal import JournalOutcome, Priority
from upgrader.systemd.listen_fds import own_number

if TYPE_CHECKING:  # loaded by the instances that migrate live
    from upgrader.instance import save
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.interfaces import Loop
    from upgrader.instance.live_source import Built, LiveSource, MigrationRequest
    from upgrader.protocol import identity, image, phase, switchover
    from upgrader.protocol.fd import Fd
    from upgrader.systemd import own_unit
else:
    phase = later("upgrader.protocol.phase")
    save = later("upgrader.instance.save")
    image = later("upgrader.protocol.image")
    identity = later("upgrader.protocol.identity")
    switchover = later("upgrader.protocol.switchover")
    own_unit = later("upgrader.systemd.own_unit")

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
        environment: Mapping[str, str],
    ) -> None:
        """`destination`: what this instance was loaded by."""
        self.frozen = False  #: everything has moved; nothing here touches it any more
        self.exit_status = 0  #: of the process, once everything has moved
        self.ends_failed = False  #: if it ends by itself, systemd shall take that for a failure
        self.outlive: list[Fd] = []  #: pidfds of processes that do not end with this one
        self._held_at: int | None = None
        self._deadline = self._killed = float("inf")  # of a stop: all is held, PID 1 sends SIGKILL
        self._report = report
        self._declarations = report.declarations
        self._store = store
        self._answering = answering
        self._destination = destination
        self._migration: LiveSource | None = None
        self._watchdog = watchdog_span(environment, own_number(environment))

    @property
    def held(self) -> bool:
        """Whether new work is held, before a freeze."""
        return self._held_at is not None

    def holds(self, held: bool) -> None:
        """New work is held from now on, or not any more: the pause counts from there."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._held_at = (self._held_at or now) if held else None

    # To another process, or to what this one becomes

    def give(self, request: MigrationRequest, loop: Loop) -> LiveSource:
        """Give everything to a destination that is ready, up to its Ack, or serve on.

        Run where nothing else of this instance runs. Afterwards it is SERVING, or COMMITTED: then
        its next events are still to be fed.
        """
        from upgrader.instance.live_source import LiveSource

        report = self._report
        report.standing = Standing.MIGRATING
        self._migration = migration = LiveSource(
            request,
            _Steps(self, loop),
            limit=report.parameters.downtime_limit,
            timeout=report.parameters.migration_timeout,
            beat=self._watchdog / 2 if self._watchdog else float("inf"),
        )
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

    def execute(self, execution: Execution, loop: Loop) -> None:
        """Become the new version; returns only if that fails, and this instance serves on.

        Run where nothing else of this instance runs.
        """
        from upgrader.instance.exec_mode import ExecutionError, become

        report = self._report
        report.standing = Standing.MIGRATING
        report.progress.enter(phase.Phase.FROZEN)
        command = execution.command
        manifest = None
        try:
            with no_collection():
                frozen, busy = loop.freeze()
                secrets = save.secrets(report.generation, frozen)
                manifest, fds = self._build(frozen, busy)
                for item in manifest.left_behind[:20]:
                    _log.warning("left behind: %s of %r: %s", item.what, item.backend, item.why)
                message = f"generation {report.generation} becomes {' '.join(command.arguments)}"
                report.tell(Priority.INFO, "source", "migrate", JournalOutcome.DONE, message)
                name = StoreName(Stored.CHANNEL, str(report.generation))
                store = self._store if report.supervised else None
                beyond = self._declarations.beyond_image()
                beyond += [(str(name), fd) for name, fd in secrets]
                become(execution, manifest, fds, beyond, name, store, report.unit)
        except (UpgradeError, OSError) as error:
            code = Code.SOURCE_FAILED
            if isinstance(error, ExecutionError | BusyWork):
                code = error.code
            if manifest:
                self.guard(manifest)
            execution.failed.set_result(self._serve_on(code, str(error)))
            loop.resume()

    def _build(
        self,
        frozen: Sequence[save.Frozen],
        busy: Sequence[image.LeftBehind],
        readers: save.Readers | None = None,
        *,
        partial: bool = False,
        beyond: Sequence[tuple[str, identity.HasFileno]] = (),
    ) -> tuple[image.Manifest, list[identity.HasFileno]]:
        """`readers`: what the destination has said that it can read; `partial`: leave behind what
        cannot be saved; `beyond`: what PID 1 would pass to a start besides, by its FDNAME."""
        report = self._report
        return save.build(
            self._declarations, report.generation, report.version, frozen, busy, report.overrides,
            readers or save.Readers(), partial=partial, beyond=beyond, withheld=self._withheld(),
            held_at=self._held_at,
        )  # fmt: skip

    def _withheld(self) -> list[str]:
        """The backends that are no sockets and do not move."""
        return [n for n in self._declarations.backends if not self._answering.crosses(n)]

    def guard(self, manifest: image.Manifest) -> None:
        """Nothing was given away: what the other process may have changed is set again."""
        for name, described in (manifest.backends or {}).items():
            self._declarations.backends[name].serve_on(described)

    def _serve_on(self, code: Code, why: str) -> str:
        """Report that nothing was given away; returns why, as it is told."""
        assert self._answering.negotiation is not None
        report = self._report
        report.standing = Standing.SERVING
        code, reason = self._answering.negotiation.over(code, why)
        message = f"generation {report.generation} serves on: {reason}"
        if code is Code.PREFLIGHT_PASSED:
            report.tell(Priority.INFO, "source", "migrate", JournalOutcome.DONE, message)
        else:
            report.tell(Priority.ERR, "source", "migrate", JournalOutcome.FAILED, message)
        return reason

    # The end

    def told_to_stop(self, *, failed: bool = False) -> tuple[bool, float]:
        """Find out how to end: (whether to park, by when all must be held, as of `time.monotonic`).

        At a desk, with UPGRADER=off, and where no job and no Restart= starts another instance, a
        stop is for good; so it is where no bus is to be seen, and no restart was announced.
        `failed`: this instance ends by itself, with a failure. Two seconds, or a
        fifth, of TimeoutStopSec= are kept for parking itself, before PID 1 sends SIGKILL.
        """
        report = self._report
        report.standing = Standing.STOPPING
        self._destination.wait_settled()
        stop = own_unit.StopJob(own_unit.StopReason.STOP, float("inf"))
        if report.supervised:
            with self._destination.lent():
                stop = own_unit.ask(report.unit, failed=failed or self.ends_failed)
            if failed or (self.ends_failed and stop.reason is own_unit.StopReason.NO_JOB):
                self.exit_status = 1
            deaf = stop.reason is own_unit.StopReason.UNKNOWN and report.bus_hidden
            if deaf and not failed and not self._answering.restart_announced:
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
        connections: Sequence[save.Frozen],
        busy: Sequence[image.LeftBehind],
        turns: Sequence[str],
    ) -> bool:
        """Park everything; False (and said so) if that cannot be done and must be drained. `turns`:
        names of those that run still, and end with this process.

        Run where nothing else of this instance accepts connections: what is given back here is taken
        by nobody else.
        """
        report = self._report
        self._answering.close()
        self._destination.give_back()
        why = "it did not end within drain-timeout, and is cut"
        busy = [*busy, *(image.LeftBehind(name, "turn", why) for name in turns)]
        secrets: list[tuple[StoreName, Fd]] = []
        try:
            with no_collection():
                secrets = save.secrets(report.generation, connections)
                for name, fd in secrets:
                    self._store.push(name, fd)
                manifest, fds = self._build(connections, busy, partial=True)
                outcome = save.keep(
                    manifest, fds, self._store, report.unit,
                    one_by_one=report.parameters.mechanism is Mechanism.FD_STORE,
                    there={n for n, b in self._declarations.backends.items() if b.kind.persistent},
                )  # fmt: skip
        except (UpgradeError, OSError) as error:
            with contextlib.suppress(UpgradeError):
                self._store.remove(*(name for name, _ in secrets))
            message = f"nothing could be parked, draining instead: {error}"
            report.tell(Priority.ERR, "source", "park", JournalOutcome.FAILED, message)
            return False
        message = (
            f"generation {report.generation} parked: {outcome.fds} FD{'s' * (outcome.fds != 1)}"
        )
        for item in outcome.left_behind[:20]:
            message += f"\nleft behind: {item.what} of {item.backend!r}: {item.why}"
        if outcome.left_behind:
            message += f"\n{len(outcome.left_behind)} left behind in all"
        priority = Priority.ERR if manifest.unsaved or turns else Priority.INFO
        report.tell(priority, "source", "park", JournalOutcome.DONE, message)
        self._store.remove(
            *(n for w in self._withheld() for n in self._declarations.backends[w].stored_names)
        )
        self.retire(manifest)
        self._end_in_time()
        return True

    def retire(self, manifest: image.Manifest) -> None:
        """The states are another instance's, as they are in this image."""
        given = {state.name: state for state in manifest.states}
        for name, declared in self._declarations.states.items():
            declared.retire(given.get(name))
        for name in manifest.backends or ():
            self._declarations.backends[name].retire()

    def tell_strays(self) -> None:
        """Say which states were written to after they had been given away."""
        for name, declared in self._declarations.states.items():
            if declared.was_written:
                self._report.tell(
                    Priority.ERR, "source", "stray", JournalOutcome.FAILED,
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
            self._report.tell(Priority.ERR, "source", "park", JournalOutcome.DONE, message)
            os._exit(self.exit_status)

        timer = threading.Timer(max(seconds, 0), end)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """A stop for good: close the listeners and take all of ours out of the FD store.

        A listener that PID 1 keeps with nobody behind it makes clients hang, not be refused.
        """
        names = [
            name for bound in self._declarations.sockets.values() for name in bound.stored_names
        ]
        for backend in self._declarations.backends.values():
            names += backend.stored_names
        names += [self._destination.insurance] if self._destination.insurance else []
        try:
            self._store.remove(*names)
        except UpgradeError as error:
            _log.warning("%s", error)
        for bound in self._declarations.sockets.values():
            _unlink(bound)
            bound.close()


class _Steps:
    """What the actions of a switchover mean for an instance; implements `live_source.Steps`."""

    def __init__(self, side: SourceSide, loop: Loop) -> None:
        self._side = side
        self._report = side._report
        self._loop = loop
        self._built: Built | None = None
        self._watchdog = ("WATCHDOG=1",) if side._watchdog else ()

    def freeze(self) -> Built:
        """Build the image."""
        from upgrader.instance.live_source import Built

        progress = self._report.progress
        progress.enter(phase.Phase.FROZEN)
        negotiation = self._side._answering.negotiation
        readers = negotiation.offer.readers if negotiation else None
        frozen, busy = self._loop.freeze()
        takes_passed = negotiation is not None and negotiation.offer.takes_passed
        beyond: list[tuple[str, identity.HasFileno]] = []
        if takes_passed:
            secrets = save.secrets(self._report.generation, frozen)
            beyond = self._side._declarations.beyond_image()
            beyond += [(str(name), fd) for name, fd in secrets]
        else:
            why = "the library of the new version does not take it"
            here = self._side._declarations
            busy += [image.LeftBehind(item.name, "FD", why) for item in here.passed]
        manifest, fds = self._side._build(frozen, busy, readers, beyond=beyond)
        self._built = built = Built(manifest, fds)
        progress.enter(phase.Phase.LOADING, fds=len(fds), left_behind=len(manifest.left_behind))
        return built

    def resume(self, code: Code, reason: str) -> None:
        """Serve on, then say so."""
        if self._built:
            self._side.guard(self._built.manifest)
        self._loop.resume()
        if code is Code.STATE_UNREADABLE and (why := self._report.unreadable):
            code, reason = Code.SOURCE_FAILED, why  # no fault of the version that was to load it
        self._side._serve_on(code, reason)

    def retire(self) -> None:
        """The states are another instance's from here on."""
        report = self._report
        pause = time.clock_gettime(time.CLOCK_MONOTONIC) - self._image.manifest.frozen_at / 1e9
        report.progress.enter(phase.Phase.COMMITTED, pause=round(pause, 6))
        report.standing = Standing.DRAINING
        self._side.retire(self._image.manifest)
        self._loop.give_up()

    def insure(self) -> None:
        """Leave what may be replayed; what the instance before has left is older."""
        backends = self._side._declarations.backends.values()
        once = {each.name for each in backends if not each.kind.replayable}
        manifest, fds = save.insurance(self._image.manifest, self._image.fds, once)
        self._park(manifest, fds, Stored.INSURANCE)
        self._side._destination.forget_insurance()

    def name_successor(self, pid: int) -> None:
        """Tell PID 1, and wait until it has taken that."""
        notifier = self._report.notifier
        notifier.send(f"MAINPID={pid}", *self._watchdog)
        notifier.barrier()

    def let_go(self) -> None:
        """Close what has moved: everything is another instance's, and PID 1 knows."""
        self._loop.let_go()
        for backend in self._side._declarations.backends.values():
            if backend.moved:
                self._side.outlive += backend.processes()
                backend.close()
        self._done("retired")

    def park(self) -> None:
        """Leave everything with PID 1, or nothing if the unit is stopped for good."""
        self._done("parked")
        if own_unit.ask(self._report.unit).reason is own_unit.StopReason.STOP:
            self._side._store.remove(self._name(Stored.INSURANCE))
        else:
            manifest, fds = save.lasting(self._image.manifest, self._image.fds)
            self._park(manifest, fds, Stored.CHANNEL)

    def exit(self, *, failed: bool) -> None:
        """Have the process end as soon as `attach` is left."""
        self._side.frozen = True
        self._side.exit_status = int(failed)

    def wake(self) -> None:
        """Send the sign of life that the author's own code cannot send now."""
        if self._watchdog:
            self._report.notifier.send(*self._watchdog)

    @property
    def _image(self) -> Built:
        assert self._built is not None
        return self._built

    def _park(
        self, manifest: image.Manifest, fds: Sequence[identity.HasFileno], what: Stored
    ) -> None:
        save.park(manifest, fds, self._name(what), self._side._store, self._report.unit)

    def _name(self, what: Stored) -> StoreName:
        return StoreName(what, str(self._report.generation))

    def _done(self, how: str) -> None:
        report = self._report
        report.progress.enter(phase.Phase.DONE)
        message = f"generation {report.generation} has been replaced, {how}"
        report.tell(Priority.INFO, "source", "migrate", JournalOutcome.DONE, message)


def _unlink(bound: Bound) -> None:
    """Remove the socket file of a listener that we bound, if it is still ours to remove."""
    for address in bound.addresses if bound.persistent else ():
        if isinstance(address.name, str) and address.name[0] == "/":
            with contextlib.suppress(OSError):
                os.unlink(address.name)
