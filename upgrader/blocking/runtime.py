# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs an instance without asyncio: one selector, one thread, and migrations between two turns.

Handlers of connections run to their end each time something has come, and never wait.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Self

from upgrader.backends.kind import BackendKind
from upgrader.blocking.all_connections import ServedConnections
from upgrader.blocking.handled_connection import BlockingConnection
from upgrader.blocking.loop_signals import LoopSignals
from upgrader.blocking.table_rounds import TableRounds
from upgrader.blocking.two_waits import WaitForWork
from upgrader.errors import BusyWork
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.declarations import Connections
from upgrader.instance.declared_socket import Bound
from upgrader.instance.destination_side import refused_by_check
from upgrader.instance.handles import DeclaredSocket
from upgrader.instance.parts import InstanceParts
from upgrader.instance.turns import PAUSES, Settled
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.blocking import draining
    from upgrader.instance import author_calls
    from upgrader.instance.author_calls import AuthorRound
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.frozen import Moving
    from upgrader.instance.live_source import LiveSource, MigrationRequest
    from upgrader.protocol import image, switchover
else:
    draining = later("upgrader.blocking.draining")
    author_calls = later("upgrader.instance.author_calls")
    switchover = later("upgrader.protocol.switchover")

_GRACE = 1.0  # seconds for what a replaced instance does at its end, however late it is
_log = logging.getLogger("upgrader")


class BlockingRuntime:
    """Runs the parts of an instance from load to end; implements `interfaces.Loop`."""

    def __init__(
        self,
        parts: InstanceParts,
        backends: Mapping[Bound, DeclaredSocket],
        others: Sequence[BackendKind],
        make_peer: Callable[[BlockingConnection], Any],
    ) -> None:
        """`backends`: which the program reads itself, and as what; `others`: those that are no sockets;
        `make_peer`: what handlers get."""
        self._parts = parts
        self._declarations = parts.declarations
        self._backends = backends
        self._others = others
        self._stopped = threading.Event()
        self._requests: deque[MigrationRequest | Execution] = deque()
        self._request: MigrationRequest | Execution | None = None  # the one that is waited for
        self._wait: WaitForWork | None = None  # of the request, or of a restart
        self._round: AuthorRound | None = None  # the last one before a freeze
        self._deadline = float("-inf")  # of what drains here
        self._channel: socket.socket | None = None  # of the destination, during the waits
        self._news = False  # there is something to be read on it
        self._ending = False, 0.0  # whether to park, and by when all must be held
        self._reloads: deque[Future[None]] = deque()
        self._signals = LoopSignals(parts, self._stopped, self._wake_up, self._want_reload)
        self._trusted = float("inf")  # when it is; of `time.monotonic`
        self._selector = selectors.DefaultSelector()
        self._rounds = TableRounds(parts.source, self._selector)
        self.connections = ServedConnections(parts, self._selector, make_peer)
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        parts.report.connections_open = self.connections.all_open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._waker.close()
        self._wake.close()

    def serve(self) -> Iterator[DeclaredSocket | BackendKind]:
        """Load, serve and end; see `Instance.serve`."""
        parts = self._parts
        self._signals.listen(self._waker.fileno())
        destination = parts.destination
        parts.answering.prepare(
            self._want, self._want_reload, self._settle, destination, now=destination.live
        )
        try:
            self._load()
            parts.open(self._signals.heed_later)
            self._trusted = time.monotonic() + parts.report.parameters.insurance
            yield from self._turns()
            if not self.connections.frozen:
                self._retire()
            if self.connections.frozen and self._declarations.farewells:
                self._say_farewell()
        finally:
            self._signals.restore()

    # The beginning

    def _load(self) -> None:
        destination = self._parts.destination
        try:
            preparations = self._declarations.preparations
            beside = bool(preparations) and destination.borrow()
            if beside:
                self._call(preparations)
            loaded = destination.load()
            if not beside:
                self._call(preparations)
            self._call(self._declarations.checks)
            destination.commit(loaded, lambda: self._begin(loaded))
            destination.settle(loaded)
        except Exception as error:
            destination.refuse(error)
            raise

    def _call(self, checks: Sequence[Callable[..., Any]]) -> None:
        """Call what may refuse this instance."""
        for check in checks:
            try:
                check(**self._declarations.values(check))
            except Exception as error:
                raise refused_by_check(check, error) from error

    def _begin(self, loaded: LoadedInstance) -> None:
        for bound in self._backends:
            for sock in bound.sockets:
                sock.setblocking(False)
                self._selector.register(sock, selectors.EVENT_READ, bound)
        for other in self._others:
            for number in other.fds:
                self._selector.register(number, selectors.EVENT_READ, other)
        self.connections.begin(loaded)

    # One turn after the other

    def _turns(self) -> Iterator[DeclaredSocket | BackendKind]:
        destination = self._parts.destination
        for bound, backend in self._backends.items():
            for _ in range(len(bound.backlog)):
                yield backend
        while True:
            due = [self._trusted] if destination.insurance else []
            due += [self._wait.until] if self._wait else self._rounds.due
            left = max(min(due) - time.monotonic(), 0) if due else None
            for key, events in self._selector.select(left):
                match key.data:
                    case Bound() as bound:
                        yield self._backends[bound]
                    case BackendKind() as other:
                        yield other
                    case Connections() as connections:
                        self.connections.accept(connections, key.fileobj)
                    case BlockingConnection() as connection:
                        self.connections.serve(connection, events)
                    case TableRounds():
                        pass  # it looks for itself, below
                    case _ if key.fileobj is self._channel:
                        self._hear()
                    case _:
                        self._wake.recv(4096)
                        self._signals.heed()
                        self._reload()
            if self._stopped.is_set():
                if self._try_to_stop():
                    return
            elif self._try_to_migrate():
                return
            if destination.insurance and time.monotonic() >= self._trusted:
                self._trusted += 0 if destination.trust() else 1

    def _want_reload(self) -> None:
        """In the control thread: have the callbacks run between two turns, and wait for them."""
        done: Future[None] = Future()
        self._reloads.append(done)
        self._wake_up()
        done.result()

    def _settle(self) -> Settled:
        """In a thread of the control socket: the first wait of a restart that is about to be asked
        for, while the loop serves."""
        turns = self._parts.turns
        begun = turns.begun()
        turns.wait_ended(begun, self._parts.report.parameters.drain_timeout)
        return Settled(turns.shown(begun), [])

    def _reload(self) -> None:
        while self._reloads:
            done = self._reloads.popleft()
            try:
                for callback in self._declarations.reloads:
                    callback(**self._declarations.values(callback))
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _want(self, request: MigrationRequest | Execution) -> None:
        self._requests.append(request)
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    # The end

    def _migrate(self, request: MigrationRequest | Execution) -> bool:
        """Give everything to a live destination, or become it; False if this instance serves on."""
        from upgrader.instance.live_source import (
            MigrationRequest,  # since it answers, it has been loaded
        )

        source, parameters = self._parts.source, self._parts.report.parameters
        if not isinstance(request, MigrationRequest):
            source.execute(request, self)
            return False
        migration = source.give(request, self)
        if migration.state is switchover.Source.SERVING:
            return False
        self._parts.report.drains_until = time.time() + parameters.live_drain_timeout
        self._deadline = time.monotonic() + parameters.live_drain_timeout
        self._drain(migration)
        return True

    def _drain(self, migration: LiveSource) -> None:
        """Send what could not move, while PID 1 is told who its main process is."""
        heard = None

        def goes_on(unsent: bool) -> bool:
            nonlocal heard
            while migration.state is switchover.Source.COMMITTED:
                if migration.told is not heard:
                    heard = migration.told
                    heard.add_done_callback(lambda _: self._wake_up())
                if not migration.told.done():
                    return True
                migration.side.feed(migration.told.result())
            retired = migration.state is switchover.Source.RETIRED
            return retired and unsent and not self._stopped.is_set()

        draining.drain(self.connections.staying, self._deadline, self._wake, goes_on)
        if migration.state is switchover.Source.RETIRED:
            stopped = self._stopped.is_set()
            migration.side.feed(switchover.Event.STOP if stopped else switchover.Event.DRAINED)

    def _try_to_migrate(self) -> bool:
        """Go on with the migration that is wanted, if it is time; True if this instance is over. If
        something still runs after the last try, it is refused."""
        if self._wait is None:
            if self._request is None:
                if not self._requests:
                    return False
                self._request = self._requests.popleft()
                self._rounds.begin(self._request, self)
            if not self._rounds.over():
                return False
            if not self._rounds.end():
                self._request = None
                return False
            parameters = self._parts.report.parameters
            last = time.monotonic() + parameters.migration_timeout / 2  # the rest is for the image
            until = min(last, time.monotonic() + parameters.drain_timeout)
            self._wait = WaitForWork(
                self._parts, self._wake_up, self._quiesce, self._calls.resumed,
                until=until, pauses=iter(PAUSES), deadline=last,
            )  # fmt: skip
            self._watch_channel(self._request)
        if not self._news and not self._wait.over():
            return False
        request = self._end_wait()
        return request is not None and self._migrate(request)

    def _try_to_stop(self) -> bool:
        """Go on with the restart that this instance was told to make way for; True if it is time to
        end. A stop for good does not wait here."""
        if self._wait is None or self._request is not None:
            self._end_wait()
            parks, deadline = self._parts.source.told_to_stop()
            self._ending = parks, deadline
            if not parks:
                return True
            until = deadline - self._parts.report.parameters.downtime_limit
            self._wait = WaitForWork(
                self._parts, self._wake_up, self._quiesce, self._calls.resumed,
                until=until, pauses=chain(PAUSES, repeat(PAUSES[-1])), deadline=deadline, stops=True,
                unsent=self.connections.has_unsent,
            )  # fmt: skip
        if not self._wait.over():
            return False
        self._end_wait()
        return True

    def _end_wait(self) -> MigrationRequest | Execution | None:
        """Returns the request that was waited for."""
        self._rounds.end()
        if self._wait:
            self._wait.close()
            self._round = self._wait.round
        request, self._request, self._wait = self._request, None, None
        if self._channel:
            self._selector.unregister(self._channel)
        self._channel, self._news = None, False
        return request

    def _watch_channel(self, request: MigrationRequest | Execution) -> None:
        """Wait no more if there is news of the destination: it has nothing to say now, so it has ended
        or is cancelled."""
        self._channel = getattr(request, "sock", None)
        if self._channel:
            self._selector.register(self._channel, selectors.EVENT_READ)

    def _hear(self) -> None:
        """The destination, which is waited with, has ended or is cancelled."""
        self._news = True
        if self._channel:
            self._selector.unregister(self._channel)
            self._channel = None

    def _quiesce(self) -> AuthorRound:
        """Begin to call the author's functions that come before a freeze."""
        quiescing = self._calls.quiesce()
        for future in quiescing.futures:
            future.add_done_callback(lambda _: self._wake_up())
        return quiescing

    def _retire(self) -> None:
        source = self._parts.source
        parks, deadline = self._ending
        self._deadline = deadline
        if parks:
            if self._round:
                self._round.log("a restart")
            cut = list(self._parts.turns.running.values())
            self.connections.frozen = source.frozen = source.park(*self.connections.freeze(), cut)
        else:
            source.leave()
            self._parts.turns.close()
            self._parts.turns.wait_idle(deadline - time.monotonic())
        if self.connections.frozen:
            # Nobody serves before this process is gone: what is sent still, the kernel has room for.
            deadline, rest = time.monotonic(), self.connections.staying
        else:
            self._parts.turns.open()
            source.leave()
            rest = self.connections.streams
        draining.drain(rest, deadline, self._wake)

    @functools.cached_property
    def _calls(self) -> author_calls.AuthorCalls:
        return author_calls.AuthorCalls(self._declarations)

    def _say_farewell(self) -> None:
        """Have run what is declared for the end of a replaced instance."""
        farewell = self._calls.replaced()
        left = min(self._deadline - time.monotonic(), self._parts.report.parameters.drain_timeout)
        farewell.wait(max(left, _GRACE))
        farewell.log("the end of a replaced instance")

    def freeze(self) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes. Raises BusyWork."""
        busy = self._parts.turns.shown(self._parts.turns.begun())
        if busy := busy + (self._round.late if self._round else []):
            raise BusyWork(busy)
        if self._round:
            self._round.require()
        return self.connections.freeze()

    def resume(self) -> None:
        """As if nothing had happened."""
        self._parts.source.holds(False)
        self._calls.resumed()
        self._parts.turns.open()

    def give_up(self) -> None:
        """Nothing that has moved is touched any more; the rest is drained."""
        self.connections.frozen = True

    def let_go(self) -> None:
        """Close our copies of what has moved."""
        self.connections.close_copies()
        for bound in self._declarations.sockets.values():
            bound.close()
