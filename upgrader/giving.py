# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance as the source: it answers who wants to migrate, and gives everything away.

It never loads anything; `instance` does, and ends what could not be given.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from upgrader import outgoing
from upgrader.account import Account
from upgrader.codes import Code
from upgrader.description import Phase, Standing
from upgrader.errors import UpgradeError
from upgrader.image import LeftBehind
from upgrader.process import no_collection, watchdog_span
from upgrader.rendezvous import DRAINING, socket_name, socket_path
from upgrader.switchover import Event, Source
from upgrader.systemd.activation import own_number
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.journal import Outcome, Priority
from upgrader.systemd.stop import StopReason, ask

if TYPE_CHECKING:  # loaded by the instances that migrate live
    from upgrader.control import Control
    from upgrader.execution import Execution
    from upgrader.live_destination import Taker
    from upgrader.live_source import Built, Giver, Request
    from upgrader.negotiation import Negotiation

_log = logging.getLogger("upgrader")


class Giving(Account):
    """The part of an instance that lives on in another one."""

    def __init__(self, service: str, version: str, environment: Mapping[str, str]) -> None:
        super().__init__(service, version, environment)
        self.frozen = False  #: everything has moved; nothing here touches it any more
        self.exit_status = 0  #: of the process, once everything has moved
        self._store = FdStore(self._notifier)
        self._taker: Taker | None = None
        self._control: Control | None = None
        self._make_socket: Callable[[], None] | None = None
        self._negotiation: Negotiation | None = None
        self._insured: StoreName | None = None
        self._forgetting: threading.Thread | None = None
        self._giver: Giver | None = None
        self._settled = threading.Event()  # PID 1 listens to this process
        self._watchdog = watchdog_span(environment, own_number(environment))
        self._socket_path = socket_path(environment)
        invocation = environment.get("INVOCATION_ID", "")
        self._socket_name = socket_name(invocation) if invocation else ""

    def answer_with(
        self, on_request: Callable[[Request | Execution], object], on_reload: Callable[[], object]
    ) -> None:
        """Before `load`: what the instance's socket calls, in another thread."""
        if not self._supervised:
            return
        path, name = self._socket_path, self._socket_name
        if not path and not name:
            _log.info("no RuntimeDirectory=: this instance has no socket, and no live upgrade")
            return

        def make() -> None:
            # All that is needed now, because the files on disk may be another version's by then.
            from pathlib import Path

            from upgrader import __version__, live_source  # noqa: F401
            from upgrader.control import Control
            from upgrader.negotiation import Negotiation
            from upgrader.started import ask_settings

            self.settings = ask_settings(self.unit)
            self._negotiation = Negotiation(self, __version__, on_request, on_reload)
            try:
                place = Path(path) if path else name
                self._control = control = Control(place, self._negotiation, __version__)
            except OSError as error:
                _log.error("%s: %s: nobody can ask this instance", path or name, error.strerror)
                return
            self.progress.on_change(control.announce)

        self._make_socket = make
        if self._taker:  # the source still serves; later, clients would wait for this
            make()
            self._make_socket = None

    def answer(self) -> None:
        """Open this instance's socket, in a thread: clients wait."""

        def opening() -> None:
            if self._make_socket:
                self._make_socket()
            if self._control:
                self._control.open()
            self.try_states()

        threading.Thread(target=opening, name="upgrader-opening", daemon=True).start()

    def give(self, request: Request) -> Giver:
        """Give everything to a destination that is ready, up to its Ack, or serve on.

        Run where nothing else of this instance runs. Afterwards it is SERVING, or COMMITTED: then
        its next events are still to be fed.
        """
        from upgrader.live_source import Giver

        self.standing = Standing.MIGRATING
        self._giver = giver = Giver(
            request,
            _Steps(self),
            limit=self.parameters.downtime_limit,
            timeout=self.parameters.migration_timeout,
            beat=self._watchdog / 2 if self._watchdog else float("inf"),
        )
        with no_collection():
            if giver.give() is Source.SERVING:
                self._giver = None
        return giver

    def stop_giving(self) -> None:
        """End a migration that was left in the middle, once PID 1 knows whom it has."""
        if self._giver:
            self._giver.settle()
            if self._giver.state is Source.RETIRED:
                self._giver.side.feed(Event.STOP)

    # What a loop does; in the order of a migration

    def _freeze(self) -> tuple[list[outgoing.Frozen], list[LeftBehind]]:
        """What moves, and what stays and why; nothing changes."""
        raise NotImplementedError

    def _resume(self) -> None:
        """Serve as if nothing had happened."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """Nothing that has moved is touched any more, and nothing is closed; the rest is drained."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Close what has moved."""
        raise NotImplementedError

    def execute(self, execution: Execution) -> None:
        """Become the new version; returns only if that fails, and this instance serves on.

        Run where nothing else of this instance runs.
        """
        from upgrader.execution import ExecutionError, become

        self.standing = Standing.MIGRATING
        self.progress.enter(Phase.FROZEN)
        command = execution.command
        try:
            with no_collection():
                manifest, fds = outgoing.build(
                    self.declarations,
                    self.generation,
                    self.version,
                    *self._freeze(),
                    self.overrides,
                )
                for item in manifest.left_behind[:20]:
                    _log.warning("left behind: %s of %r: %s", item.what, item.backend, item.why)
                message = f"generation {self.generation} becomes {' '.join(command.arguments)}"
                self._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
                name = StoreName(Stored.CHANNEL, str(self.generation))
                store = self._store if self._supervised else None
                become(execution, manifest, fds, name, store, self.unit)
        except (UpgradeError, OSError) as error:
            code = error.code if isinstance(error, ExecutionError) else Code.SOURCE_FAILED
            execution.failed.set_result(self._serve_on(code, str(error)))
            self._resume()

    def _serve_on(self, code: Code, why: str) -> str:
        """Report that nothing was given away; returns why, as it is told."""
        assert self._negotiation is not None
        self.standing = Standing.SERVING
        code, reason = self._negotiation.over(code, why)
        message = f"generation {self.generation} serves on: {reason}"
        if code is Code.PREFLIGHT_PASSED:
            self._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
        else:
            self._report(Priority.ERR, "source", "migrate", Outcome.FAILED, message)
        return reason

    def drains(self) -> None:
        """Replaced, but not empty: be found beside the new instance until this process ends."""
        if self._control and self._socket_path:
            from pathlib import Path

            path = Path(self._socket_path).with_name(DRAINING.format(self.generation))
            try:
                self._control.also_at(path)
            except OSError as error:
                _log.warning("%s: %s: nobody sees what is drained here", path, error.strerror)

    def crosses(self, backend: str) -> bool:
        """Whether the connections of a backend move, as far as this side knows."""
        if self._negotiation:
            return self._negotiation.crosses(backend)
        return self.parameters.transfers(backend)

    @property
    def insured(self) -> bool:
        """Whether the source has left an insurance for this instance."""
        return self._insured is not None

    def trust(self) -> bool:
        """This instance has lived through its first seconds: the insurance is not needed.

        False while the source may still park it: then ask again later.
        """
        if self._settled.is_set() and self._insured and not self._forgetting:
            # In a thread: PID 1 may take its time, and clients do not wait for it.
            self._forgetting = threading.Thread(target=self._forget_insurance, daemon=True)
            self._forgetting.start()
        return self._insured is None

    def _forget_insurance(self) -> None:
        if insured := self._insured:
            with contextlib.suppress(UpgradeError):
                self._store.remove(insured)
            self._insured = None


class _Steps:
    """What the actions of a switchover mean for an instance; implements `live_source.Steps`."""

    def __init__(self, instance: Giving) -> None:
        self._instance = instance
        self._built: Built | None = None
        self._watchdog = ("WATCHDOG=1",) if instance._watchdog else ()

    def freeze(self) -> Built:
        """Build the image."""
        from upgrader.live_source import Built

        here = self._instance
        here.progress.enter(Phase.FROZEN)
        frozen, busy = here._freeze()
        readers = here._negotiation.readers if here._negotiation else outgoing.Readers()
        manifest, fds = outgoing.build(
            here.declarations, here.generation, here.version, frozen, busy, here.overrides, readers
        )
        self._built = built = Built(manifest, fds)
        here.progress.enter(Phase.LOADING, fds=len(fds), left_behind=len(manifest.left_behind))
        return built

    def resume(self, code: Code, reason: str) -> None:
        """Serve on, then say so."""
        here = self._instance
        here._resume()
        here._serve_on(code, reason)

    def retire(self) -> None:
        """The states are another instance's from here on."""
        here = self._instance
        pause = time.clock_gettime(time.CLOCK_MONOTONIC) - self._image.manifest.frozen_at / 1e9
        here.progress.enter(Phase.COMMITTED, pause=round(pause, 6))
        if here._negotiation:
            here._negotiation.committed()
        here.standing = Standing.DRAINING
        for declared in here.declarations.states.values():
            declared.retire()
        here._give_up()

    def insure(self) -> None:
        """Leave what may be replayed; what the instance before has left is older."""
        here = self._instance
        manifest, fds = outgoing.insurance(self._image.manifest, self._image.fds)
        outgoing.park(manifest, fds, self._name(Stored.INSURANCE), here._store, here.unit)
        here._forget_insurance()

    def name_successor(self, pid: int) -> None:
        """Tell PID 1, and wait until it has taken that."""
        notifier = self._instance._notifier
        notifier.send(f"MAINPID={pid}", *self._watchdog)
        notifier.barrier()

    def let_go(self) -> None:
        """Close what has moved: everything is another instance's, and PID 1 knows."""
        self._instance._let_go()
        self._done("retired")

    def park(self) -> None:
        """Leave everything with PID 1, or nothing if the unit is stopped for good."""
        here = self._instance
        self._done("parked")
        if ask(here.unit).reason is StopReason.STOP:
            here._store.remove(self._name(Stored.INSURANCE))
        else:
            name = self._name(Stored.CHANNEL)
            outgoing.park(self._image.manifest, self._image.fds, name, here._store, here.unit)

    def exit(self, *, failed: bool) -> None:
        """Have the process end as soon as `attach` is left."""
        self._instance.frozen = True
        self._instance.exit_status = int(failed)

    def wake(self) -> None:
        """Send the sign of life that the author's own code cannot send now."""
        if self._watchdog:
            self._instance._notifier.send(*self._watchdog)

    @property
    def _image(self) -> Built:
        assert self._built is not None
        return self._built

    def _name(self, what: Stored) -> StoreName:
        return StoreName(what, str(self._instance.generation))

    def _done(self, how: str) -> None:
        here = self._instance
        here.progress.enter(Phase.DONE)
        message = f"generation {here.generation} has been replaced, {how}"
        here._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
