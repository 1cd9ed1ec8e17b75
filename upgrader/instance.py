# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instance: what the blocking and the asyncio face have in common; runs no loop.

Declare, load, commit, and at the end park or leave. It holds no protocol state of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from upgrader import outgoing
from upgrader.arrival import Arrival
from upgrader.backends import Address, Fd
from upgrader.declarations import (
    Bound,
    Connections,
    Datagrams,
    Declared,
    Listener,
)
from upgrader.description import Standing
from upgrader.errors import (
    DeclarationError,
    PreflightPassed,
    UpgradeError,
    VerifyError,
)
from upgrader.giving import Giving
from upgrader.image import LeftBehind
from upgrader.incoming import Loader
from upgrader.parameters import Mechanism, Parameters
from upgrader.process import (
    is_main,
    no_collection,
    raise_fd_limit,
    reserve,
)
from upgrader.rendezvous import EXECUTED, PREFLIGHT, PREFLIGHT_1, TAKEOVER, UPGRADE
from upgrader.systemd.activation import forget, own_number, take
from upgrader.systemd.cgroup import own_unit
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.journal import Outcome, Priority
from upgrader.systemd.notify import one_line
from upgrader.systemd.stop import Stop, StopReason, ask
from upgrader.turns import Turn, Turns

if TYPE_CHECKING:  # loaded by the instances that migrate live
    from upgrader.live_destination import Taker

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

#: Seconds that a new owner waits for PID 1 to take it for the main process.
_NAMED = 2.0
#: FDs that parking opens at once (channel, image, ledger, barrier, bus, journal), and some.
_RESERVED = 16

_log = logging.getLogger("upgrader")


class Ended(StrEnum):
    """Why `serve` has returned."""

    STOPPED = "stopped"  #: for good: everything was drained
    MIGRATED = "migrated"  #: another instance goes on with all that was here


class Instance(Giving):
    """One running process of a service. Use `upgrader.attach`; this is what both faces share.

    One instance is one process: run several as template units (`web@1`, `web@2`) on one `.socket`.
    """

    def __init__(self, service: str, version: str, environment: MutableMapping[str, str]) -> None:
        main = environment.get("SYSTEMD_EXEC_PID")
        own = own_number(environment)
        if main and environment.get("NOTIFY_SOCKET") and main != own:
            raise DeclarationError(
                service,
                f"attach() in process {own}, but systemd started process {main}",
                remedy="one instance is one process: use template units instead of forking",
            )
        super().__init__(service, version, environment)
        self.turns = Turns()
        self.committing = False  #: from here on it owns, or knows that it must not
        self._passed = take(environment)
        self._executed = EXECUTED in environment
        self._preflight = not {PREFLIGHT, PREFLIGHT_1}.isdisjoint(environment)
        if self._executed:
            from upgrader.execution import carried

            self._passed += carried(environment)
        self._upgrade = environment.pop(UPGRADE, "")  # the id of the one that it is started in
        self._reserve: list[Fd] = []
        self._taker = self._destined(environment)
        if self._supervised:
            self.unit = own_unit()
            for variable in Parameters.unknown(environment):
                _log.warning("%s is not a parameter of upgrader", variable)
        elif main == own:
            _log.warning(
                "%s: systemd gives it no NOTIFY_SOCKET, so nothing outlives a restart;"
                " set Type=notify, NotifyAccess=exec and FileDescriptorStoreMax= in the unit", service,
            )  # fmt: skip
        else:
            _log.info("%s: not started by systemd, so nothing outlives this process", service)
        raise_fd_limit()

    # Declarations

    def state(self, cls: type[T]) -> Declared[T]:
        """Declare application state: loaded from the image, or made new on a cold start.

        Raises DeclarationError if `cls` is no state or is declared twice.
        """
        return self.declarations.add_state(cls)

    def listener(self, name: str, *, bind: str | None = None) -> Listener:
        """Declare a stream listener, taken from the image, the FD store, a `.socket` unit with
        `FileDescriptorName=name`, or else bound to `bind` (`host:port`, `unix:/path`).

        Raises DeclarationError for a bad name or address.
        """
        listener = Listener(name, Address.parse(bind) if bind else None)
        self.declarations.add_socket(listener)
        return listener

    def datagrams(self, name: str, *, bind: str | None = None) -> Datagrams:
        """Declare a datagram socket, found in the same places as a listener."""
        datagrams = Datagrams(name, Address.parse(bind) if bind else None)
        self.declarations.add_socket(datagrams)
        return datagrams

    def connections(
        self, door: Listener, *, state: type | None = None
    ) -> Callable[[Function], Function]:
        """Declare who handles the connections of a door, accepted and adopted ones alike.

        The handler gets the peer, and each declared state by the annotation of a parameter.
        `state` is a state class of which every connection has its own object (`peer.state`).
        """

        def register(handler: Function) -> Function:
            self.declarations.add_connections(Connections(door, state, handler))
            return handler

        return register

    def verify(self, check: Function) -> Function:
        """Declare a check of the loaded instance, run before it becomes the owner.

        Whatever it raises refuses the upgrade: the image stays as it was.
        """
        self.declarations.arguments(check)
        self.declarations.checks.append(check)
        return check

    def reload(self, callback: Function) -> Function:
        """Declare what `systemctl reload` does when there is nothing to upgrade (logrotate asks
        for it every night); what it raises fails the reload, and the instance serves on."""
        self.declarations.arguments(callback)
        self.declarations.reloads.append(callback)
        return callback

    def drop(self, name: str) -> None:
        """This program no longer has the state or backend `name`: an image with it is accepted."""
        self.declarations.dropped.add(name)

    def turn(self) -> Turn:
        """A stretch of work that no migration cuts in two; for threads and background tasks."""
        return self.turns.turn()

    # Loading

    def load(self) -> Arrival:
        """Load everything; raises UpgradeError, and nothing is consumed."""
        self.declarations.serving = True
        loader = Loader(
            self.declarations, self.parameters, self._store, self._passed, self._taker,
            executed=self._executed,
        )  # fmt: skip
        self._passed = []
        with no_collection():
            arrival = loader.load()
        self.generation = arrival.status.generation
        self.inherit(arrival.overrides)
        return arrival

    def arguments(self, function: Callable[..., Any], *, skip: int = 0) -> dict[str, Any]:
        """The live states that a function wants, by parameter name."""
        wanted = self.declarations.arguments(function, skip=skip)
        return {name: declared.value for name, declared in wanted.items()}

    def commit(self, arrival: Arrival, serve: Callable[[], None]) -> None:
        """Become the owner and say so: `serve` runs as soon as it is. Raises NotifyError or
        ChannelError, PreflightPassed where this is as far as it may go, and whatever `serve` raises."""
        if self._taker and self._preflight:
            raise PreflightPassed

        def own() -> None:
            self.since = time.time()
            serve()

        self.committing = True
        arrival.commit(self._notifier, self._store, own)
        self._settled.set()
        if self._taker:
            self._settled.clear()
            self._taker.become_ordinary()
            self._taker.release_takeover()
            source = str(arrival.status.source_generation)
            self._insured = StoreName(Stored.INSURANCE, source)
            threading.Thread(
                target=self._settle, args=(self._taker, arrival), name="upgrader-settling",
                daemon=True,
            ).start()  # fmt: skip
        self._reserve = reserve(_RESERVED + len(self.declarations.sockets))
        self._status = arrival.status
        self._remember(arrival.status, self._upgrade)
        self._report(Priority.INFO, "destination", "load", Outcome.DONE, str(arrival.status))

    def refuse(self, error: BaseException) -> None:
        """Say why this instance could not be loaded, or did not have to be; an owner has been."""
        if self.since:
            return
        if self._taker:
            self._taker.refuse(error)
        else:
            self._report_failure(error)

    def _report_failure(self, error: BaseException) -> None:
        if isinstance(error, PreflightPassed):
            return
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(UpgradeError):
            self._notifier.send(f"STATUS=failed to load: {one_line(text)}", "ERRNO=71")  # EPROTO
        self._report(Priority.ERR, "destination", "load", Outcome.FAILED, f"failed to load: {text}")
        if self._control:
            self._control.close()

    # A live migration

    def _settle(self, taker: Taker, arrival: Arrival) -> None:
        """In a thread: wait until PID 1 listens to this process, and tell it the rest."""
        taker.wait_for_source()
        taker.close()
        if not is_main(self.unit):
            # The source has died, and takeover names this process.
            deadline = time.monotonic() + _NAMED
            while not is_main(self.unit) and time.monotonic() < deadline:
                time.sleep(0.01)
        try:
            arrival.settle(self._notifier, self._store)
        except UpgradeError as error:
            _log.warning("%s", error)
        self._settled.set()

    def _destined(self, environment: MutableMapping[str, str]) -> Taker | None:
        """The migration that takeover has started this process for, if any."""
        if TAKEOVER not in environment:
            return None
        from upgrader.live_destination import Taker

        forget(environment)
        return Taker.from_line(
            environment.pop(TAKEOVER), self._upgrade,
            self.parameters.migration_timeout, self._report_failure,
        )  # fmt: skip

    # The end

    def told_to_stop(self, *, failed: bool = False) -> tuple[bool, float]:
        """Find out how to end: (whether to park, when to be done, as of `time.monotonic`).

        At a desk, with UPGRADER=off, and where no job and no Restart= starts another instance, a
        stop is for good. `failed`: this instance ends by itself, with a failure. A fifth of
        TimeoutStopSec= is kept for parking itself, before PID 1 sends SIGKILL.
        """
        self._reserve.clear()
        self.standing = Standing.STOPPING
        if not self._settled.wait(_NAMED):
            _log.warning("systemd has not said that this is the main process by now")
        stop = Stop(StopReason.STOP, float("inf"))
        if self._supervised:
            stop = ask(self.unit, failed=failed)
        with contextlib.suppress(UpgradeError):
            self._notifier.send("STOPPING=1")
        patience = min(self.parameters.drain_timeout, stop.timeout * 0.8)
        parks = self.parameters.enabled and stop.reason is not StopReason.STOP
        return parks, time.monotonic() + patience

    def park(self, connections: Sequence[outgoing.Frozen], busy: Sequence[LeftBehind]) -> bool:
        """Park everything; False (and said so) if that cannot be done and must be drained."""
        try:
            with no_collection():
                manifest, fds = outgoing.build(
                    self.declarations, self.generation, self.version, connections, busy,
                    self.overrides, partial=True,
                )  # fmt: skip
                outcome = outgoing.keep(
                    manifest, fds, self._store, self.unit,
                    one_by_one=self.parameters.mechanism is Mechanism.FD_STORE,
                )  # fmt: skip
        except (UpgradeError, OSError) as error:
            message = f"nothing could be parked, draining instead: {error}"
            self._report(Priority.ERR, "source", "park", Outcome.FAILED, message)
            return False
        message = f"generation {self.generation} parked: {outcome.fds} FDs"
        for item in outcome.left_behind[:20]:
            message += f"\nleft behind: {item.what} of {item.backend!r}: {item.why}"
        if outcome.left_behind:
            message += f"\n{len(outcome.left_behind)} left behind in all"
        priority = Priority.ERR if manifest.unsaved else Priority.INFO
        self._report(priority, "source", "park", Outcome.DONE, message)
        for declared in self.declarations.states.values():
            declared.retire()
        return True

    def leave(self) -> None:
        """A stop for good: close the doors and take all of ours out of the FD store.

        A listener that PID 1 keeps with nobody behind it makes clients hang, not be refused.
        """
        names = [
            StoreName(Stored(bound.kind.value), bound.name)
            for bound in self.declarations.sockets.values()
            if bound.persistent
        ]
        names += [self._insured] if self._insured else []
        try:
            self._store.remove(*names)
        except UpgradeError as error:
            _log.warning("%s", error)
        for bound in self.declarations.sockets.values():
            _unlink(bound)
            bound.close()

    def end(self, error: BaseException | None) -> None:
        """Leave `attach`; ends the process if all of it has moved.

        Without destructors then: no `finally` may say goodbye to a peer that is served elsewhere.
        """
        self.stop_giving()
        if self.frozen:
            if error is not None:
                _log.error("after serve()", exc_info=error)
                self.exit_status = 1
            if self._control:
                self._control.close()
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(self.exit_status)
        if self._control:
            self._control.close()
        if self._taker and error is not None and not self.since:  # never came as far as serve()
            self._taker.refuse(error)
        self._notifier.close()
        if isinstance(error, UpgradeError) and self._supervised:
            raise SystemExit(f"{self.service}: {error}")


def refused_by_check(check: Callable[..., Any], error: Exception) -> VerifyError:
    """The error for a check that raised."""
    if isinstance(error, VerifyError):
        return error
    return VerifyError(f"{check.__qualname__} refused: {type(error).__name__}: {error}")


def _unlink(bound: Bound) -> None:
    """Remove the socket file of a listener that we bound, if it is still ours to remove."""
    address = bound.address
    if bound.persistent and address and isinstance(address.name, str) and address.name[0] == "/":
        with contextlib.suppress(OSError):
            os.unlink(address.name)
