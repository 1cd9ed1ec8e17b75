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
from upgrader.description import Phase, Standing
from upgrader.errors import REHEARSED, UpgradeError
from upgrader.image import LeftBehind
from upgrader.parameters import DRAINING, socket_path
from upgrader.process import no_collection, watchdog_span
from upgrader.systemd.activation import own_number
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.journal import Outcome, Priority
from upgrader.systemd.stop import StopReason, ask

if TYPE_CHECKING:  # loaded by the instances that migrate live
    from upgrader.control import Control
    from upgrader.execution import Execution
    from upgrader.live import Request, Taker
    from upgrader.negotiation import Negotiation
    from upgrader.switchover import Source

_log = logging.getLogger("upgrader")


class Giving(Account):
    """The part of an instance that lives on in another one."""

    def __init__(self, service: str, version: str, environment: Mapping[str, str]) -> None:
        super().__init__(service, version, environment)
        self.exit_status = 0  #: of the process, once everything has moved
        self._store = FdStore(self._notifier)
        self._taker: Taker | None = None
        self._control: Control | None = None
        self._make_socket: Callable[[], None] | None = None
        self._negotiation: Negotiation | None = None
        self._insured: StoreName | None = None
        self._settled = threading.Event()  # PID 1 listens to this process
        self._watchdog = watchdog_span(environment, own_number(environment))
        self._socket_path = socket_path(environment)

    def answer_with(
        self, on_request: Callable[[Request | Execution], object], on_reload: Callable[[], object]
    ) -> None:
        """Before `load`: what the instance's socket calls, in another thread."""
        if not self._supervised:
            return
        path = self._socket_path
        if path is None:
            _log.info("no RuntimeDirectory=: this instance has no socket, and no live upgrade")
            return

        def make() -> None:
            # All that is needed now, because the files on disk may be another version's by then.
            from upgrader import __version__, live  # noqa: F401
            from upgrader.control import Control
            from upgrader.negotiation import Negotiation
            from upgrader.started import ask_settings

            self.settings = ask_settings(self.unit)
            self._negotiation = Negotiation(self, __version__, on_request, on_reload)
            try:
                self._control = control = Control(path, self._negotiation, __version__)
            except OSError as error:
                _log.error("%s: %s: no live upgrade", path, error.strerror)
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

        threading.Thread(target=opening, name="upgrader-opening", daemon=True).start()

    def give(
        self,
        request: Request,
        collect: Callable[[], tuple[list[outgoing.Frozen], list[LeftBehind]]],
    ) -> Source:
        """Give everything to a destination that is ready; raises nothing.

        Run where nothing else of this instance runs. Returns where this instance stands then.
        """
        from upgrader.live import Built, Giver, Hooks
        from upgrader.switchover import Source

        built: list[Built] = []
        self.standing = Standing.MIGRATING

        def freeze() -> Built:
            self.progress.enter(Phase.FROZEN)
            frozen, busy = collect()
            manifest, fds = outgoing.build(
                self.declarations, self.generation, self.version, frozen, busy, self.overrides,
                self._negotiation.readers if self._negotiation else outgoing.Readers(),
            )  # fmt: skip
            built.append(Built(manifest, fds))
            self.progress.enter(Phase.LOADING, fds=len(fds), left_behind=len(manifest.left_behind))
            return built[0]

        def insure() -> None:
            self._committed(built[0].manifest.frozen_at)
            manifest, fds = outgoing.insurance(built[0].manifest, built[0].fds)
            name = StoreName(Stored.INSURANCE, str(self.generation))
            outgoing.park(manifest, fds, name, self._store, self.unit)
            if self._insured:  # what the instance before has left is older
                self._store.remove(self._insured)
                self._insured = None

        def name_successor(pid: int) -> bool:
            self._notifier.send(f"MAINPID={pid}", *watchdog)
            self._notifier.barrier()
            return True

        # The author's own sign of life is frozen, too.
        watchdog = ["WATCHDOG=1"] if self._watchdog else []

        giver = Giver(
            request,
            Hooks(
                freeze,
                insure,
                name_successor,
                lambda: self._notifier.send(*watchdog) if watchdog else None,
                self._watchdog / 2 if self._watchdog else float("inf"),
            ),
            self.parameters.downtime_limit,
            self.parameters.migration_timeout,
        )
        with no_collection():
            stands = giver.give()
        if stands is Source.PARKED and ask(self.unit).reason is StopReason.STOP:
            self._store.remove(StoreName(Stored.INSURANCE, str(self.generation)))
        elif stands is Source.PARKED:
            name = StoreName(Stored.CHANNEL, str(self.generation))
            outgoing.park(built[0].manifest, built[0].fds, name, self._store, self.unit)
            self.exit_status = 1
        request.sock.close()
        if stands is Source.SERVING:
            reason = self._serve_on(giver.reason)
            if self._negotiation and not self._negotiation.rehearses:
                self.refused(reason)
        else:
            self.standing = Standing.DRAINING
            self.progress.enter(Phase.DONE)
            message = f"generation {self.generation} has been replaced, {stands}"
            self._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
            for declared in self.declarations.states.values():
                declared.retire()
        return stands

    def execute(
        self,
        execution: Execution,
        collect: Callable[[], tuple[list[outgoing.Frozen], list[LeftBehind]]],
    ) -> None:
        """Become the new version; returns only if that fails, and this instance serves on.

        Run where nothing else of this instance runs.
        """
        from upgrader.execution import become

        self.standing = Standing.MIGRATING
        self.progress.enter(Phase.FROZEN)
        command = execution.command
        try:
            with no_collection():
                manifest, fds = outgoing.build(
                    self.declarations, self.generation, self.version, *collect(), self.overrides
                )
                for item in manifest.left_behind[:20]:
                    _log.warning("left behind: %s of %r: %s", item.what, item.backend, item.why)
                message = f"generation {self.generation} becomes {' '.join(command.arguments)}"
                self._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
                name = StoreName(Stored.CHANNEL, str(self.generation))
                store = self._store if self._supervised else None
                become(execution, manifest, fds, name, store, self.unit)
        except (UpgradeError, OSError) as error:
            reason = self._serve_on(str(error))
            self.refused(reason)
            execution.failed.set_result(reason)

    def _serve_on(self, why: str) -> str:
        """Nothing was given away: say so; returns why, as it is told."""
        assert self._negotiation is not None
        self.standing = Standing.SERVING
        reason = self._negotiation.over(why)
        message = f"generation {self.generation} serves on: {reason}"
        if reason == REHEARSED:
            self._report(Priority.INFO, "source", "migrate", Outcome.DONE, message)
        else:
            self._report(Priority.ERR, "source", "migrate", Outcome.FAILED, message)
        return reason

    def drains(self) -> None:
        """Replaced, but not empty: be found beside the new instance until this process ends."""
        if self._control and self._socket_path:
            path = self._socket_path.with_name(DRAINING.format(self.generation))
            try:
                self._control.also_at(path)
            except OSError as error:
                _log.warning("%s: %s: nobody sees what is drained here", path, error.strerror)

    def crosses(self, backend: str) -> bool:
        """Whether the connections of a backend move, as far as this side knows."""
        if self._negotiation:
            return self._negotiation.crosses(backend)
        return self.parameters.transfers(backend)

    def _committed(self, frozen_at: int) -> None:
        pause = time.clock_gettime(time.CLOCK_MONOTONIC) - frozen_at / 1e9
        self.progress.enter(Phase.COMMITTED, pause=round(pause, 6))
        if self._negotiation:
            self._negotiation.committed()

    @property
    def insured(self) -> bool:
        """Whether the source has left an insurance for this instance."""
        return self._insured is not None

    def trust(self) -> bool:
        """This instance has lived through its first seconds: the insurance is not needed.

        False while the source may still park it: then ask again later.
        """
        if not self._settled.is_set():
            return False
        if self._insured:
            with contextlib.suppress(UpgradeError):
                self._store.remove(self._insured)
            self._insured = None
        return True
