# SPDX-License-Identifier: LGPL-2.1-or-later
"""The connections of one listener that a library owns: accepted, adopted, frozen, and ended."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from upgrader.aio.acceptor import Acceptor
from upgrader.aio.gates import Newcomer
from upgrader.aio.hosted_arrivals import Arrivals
from upgrader.aio.hosted_connection import HostedConnection
from upgrader.aio.replays import MovedAnew
from upgrader.instance.declarations import Protocols
from upgrader.instance.frozen import Frozen
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.image import LeftBehind

if TYPE_CHECKING:  # loaded where TLS connections move
    from upgrader.aio.tls_layer import TlsCrossing, TlsLayer
    from upgrader.instance.adopted import Adopted
    from upgrader.tls.moved import Moved

#: Seconds without a word after which handlers are taken to have nothing more to say, and that may pass
#: until then.
_QUIET, _QUIET_AT_LAST = 0.005, 0.05
_SPARE = 64  # closed connections that are remembered at least, before they are looked for
#: Seconds that a live migration waits for requests whose answers can say that it was the last one:
#: if they take longer, they end in the source and lose nothing, while everybody waits for them.
_FOR_REQUESTS = 0.02
_FIRST_LOOK = 0.001  # seconds; libraries do not say when a connection becomes idle
_LAST_LOOK = 0.02
_SPEAKS_TLS = "the new version speaks TLS there"
_BEING_ACCEPTED = "a connection that is being accepted"
_SWITCHED_OFF = "backend-transfer=no"
_LAST_REQUEST = 10.0  # seconds in which an idle client may ask for its last answer
_GRACE = 1.0  # seconds in which goodbyes are sent
_log = logging.getLogger("upgrader")


class HostedListener:
    """All connections of one declared `Protocols`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, declared: Protocols, *, with_state: bool = False
    ) -> None:
        """`with_state`: requests may write to states, so none of them may end in two instances."""
        self._loop = loop
        self.with_state = with_state and not declared.drains
        self._name = declared.listener.name
        self._adapter = declared.adapter
        self._tls = declared.tls
        self._crossing: TlsCrossing | None = declared.moving_tls
        self._acceptor = Acceptor(loop, declared.listener, self._accept)
        self.connections: list[HostedConnection] = []
        self._sweep_at = _SPARE
        self._arrivals = Arrivals(loop, declared, self._attach_arrived, self._let_in)
        self._attaching: set[asyncio.Task[None]] = set()
        self._arriving: set[asyncio.Task[None]] = set()  # those of them that have moved here
        self.suspended = 0  #: handlers of connections without an end that have moved away
        self._moving: list[HostedConnection] = []
        self._ending: list[HostedConnection] = []  # before this instance has given up the others
        self._told_to_end: list[LeftBehind] = []
        self._held = False
        self._crosses = True
        self._refused = ""  # why none moves that does not speak TLS
        self._anew = False
        self._quiet_by = 0.0  # of `time.monotonic`; 0 before the first look
        self._over = False
        self._one_more = False
        self._owns = True

    # The beginning

    def prepare(self, adopted: Sequence[Adopted]) -> None:
        """Load what moved here, while the source can still resume; raises UnreadableState."""
        self._arrivals.load(adopted)

    def take_arrivals(self) -> list[MovedAnew]:
        """Those without an end that have moved here; nothing of their handshakes is kept here."""
        return self._arrivals.take_anew()

    def open(self) -> None:
        """Serve: what has moved here, and whoever comes."""
        self._arrivals.open()
        self._acceptor.open()

    def _attach_arrived(self, adopted: Adopted, protocol: asyncio.BaseProtocol) -> None:
        unread, moved = adopted.state.unread, adopted.tls
        self._attach(adopted.take(), adopted.identity, protocol, unread, moved, arrived=True)

    def _accept(self, sock: socket.socket) -> None:
        try:
            protocol = self._adapter.factory()
        except Exception:
            _log.exception("%s: adapter of %s failed", self._name, self._adapter.speaks)
            sock.close()
            return
        self._attach(sock, identify(sock), protocol, b"")

    def _attach(
        self, sock: socket.socket, identity: Identity, protocol: asyncio.BaseProtocol, unread: bytes,
        moved: Moved | None = None, *, arrived: bool = False,
    ) -> None:  # fmt: skip
        def made(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
            hosted = self._host(identity, transport, protocol, newcomer.layer)
            if arrived:
                hosted.start_clock()
            if self._over and self._owns:
                hosted.finish()
            elif self._over:
                hosted.end(answers=False)
            elif self._held:
                hosted.hold(crosses=self._crosses, anew=self._anew, refused=self._refused)

        newcomer = Newcomer(protocol, unread, made)
        task = self._loop.create_task(self._connect(sock, newcomer, moved))
        for tasks in (self._attaching, self._arriving) if moved else (self._attaching,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if len(self.connections) >= self._sweep_at:  # so often that it costs nothing
            self.connections = [hosted for hosted in self.connections if not hosted.gone]
            self._sweep_at = 2 * len(self.connections) + _SPARE

    def _let_in(
        self, adopted: Adopted, transport: asyncio.Transport, protocol: asyncio.Protocol,
        layer: TlsLayer | None,
    ) -> None:  # fmt: skip
        """A connection without an end goes on here."""
        self._host(adopted.identity, transport, protocol, layer)

    def _host(
        self, identity: Identity, transport: asyncio.Transport, protocol: asyncio.BaseProtocol,
        layer: TlsLayer | None,
    ) -> HostedConnection:  # fmt: skip
        hosted = HostedConnection(
            self._name, self._adapter, identity, transport, protocol,
            tls=self._tls is not None, layer=layer,
        )  # fmt: skip
        self.connections.append(hosted)
        return hosted

    async def _connect(self, sock: socket.socket, newcomer: Newcomer, moved: Moved | None) -> None:
        try:
            if self._crossing:
                transport, newcomer.layer = await self._crossing.connect(
                    self._loop, sock, newcomer, moved
                )
                newcomer.connection_made(transport)
                return
            await self._loop.connect_accepted_socket(lambda: newcomer, sock, ssl=self._tls)
        except Exception as error:  # a peer that is gone by now, or no TLS
            _log.debug("%s: %s: %s", self._name, type(error).__name__, error)
            sock.close()

    # The end of serving

    def ask_tls(self, *, live: bool, trust: str | None, speaks: bool = False) -> None:
        """Find out whether TLS connections may move; as `TlsCrossing.ask`. `speaks`: the next instance
        speaks TLS there, as far as it is known, so that no others move."""
        if self._crossing:
            self._crossing.ask(live=live, trust=trust)
        self._refused = _SPEAKS_TLS if speaks and self._tls is None else ""

    def hold(self, *, for_good: bool, crosses: bool = True, reader: int | None = None) -> None:
        """Accept no more, and begin nothing new. `for_good`: those that cannot move are told to
        end now, because nobody serves as long as they last. `crosses`: backend-transfer is on;
        `reader`: the version of the next instance's adapter, if it is known."""
        self._held = True
        self._arrivals.close()
        self._crosses = crosses
        newest = min(self._adapter.version, self._adapter.version if reader is None else reader)
        self._anew = newest >= self._adapter.REPLAYS
        self._acceptor.close()
        for hosted in self.connections:
            hosted.hold(crosses=crosses, anew=self._anew, refused=self._refused)
            if (
                for_good
                and not (hosted.gone or hosted in self._ending)
                and not (crosses and not hosted.stays)
            ):
                why = hosted.why_it_stays if crosses else _SWITCHED_OFF
                self._told_to_end.append(LeftBehind(self._name, hosted.describe(), why))
                self._ending.append(hosted)
                if hosted.endless:
                    hosted.close()

    def resume(self) -> None:
        """As if nothing had happened."""
        self._held = False
        self._moving = []
        self._refused = ""
        for hosted in self.connections:
            hosted.release()
        self.open()

    async def all_passed(
        self, deadline: float, but: Collection[HostedConnection], *, everything: bool
    ) -> frozenset[HostedConnection]:
        """Wait until each connection that is at work for a state now, or that is busy at all
        (`everything`), has come to an end of that, or for the deadline (of `time.monotonic`); meanwhile
        they go on. One without an end is not waited for, nor are those in `but`. Returns those that
        have not."""

        def passes(hosted: HostedConnection) -> bool:
            if hosted.endless and not hosted.moves_anew:
                return False
            if everything:
                return not (hosted.gone or hosted.idle)
            return self.with_state and hosted.at_work

        waited_for = [h for h in self.connections if h not in but and passes(h)]
        look = _FIRST_LOOK
        try:
            while waited_for and time.monotonic() < deadline:
                for hosted in waited_for:
                    hosted.hold(
                        anew=hosted.takes_anew
                    )  # else one that is asked again at once would never be seen idle
                await asyncio.sleep(look)
                look = min(look * 1.5, _LAST_LOOK)
                for hosted in [h for h in waited_for if not passes(h)]:
                    waited_for.remove(hosted)
                    self._go_on(hosted)
        finally:
            for hosted in waited_for:
                self._go_on(hosted)
        return frozenset(waited_for)

    def _go_on(self, hosted: HostedConnection) -> None:
        if not self._held:
            hosted.release()

    async def settle(
        self, deadline: float, but: Collection[HostedConnection] = (), *,
        for_good: bool = False, drained: bool = False,
    ) -> bool:  # fmt: skip
        """Wait until all that can move is idle, or for the deadline (of `time.monotonic`); returns
        whether it is. `but`: these are not waited for. `for_good`: all those that cannot move are,
        as well. `drained`: what is busy may end here afterwards."""

        def busy(hosted: HostedConnection) -> bool:
            if hosted.gone or (self._crosses and not hosted.why_it_stays):
                return False
            return for_good or (self._crosses and not hosted.stays)

        for_requests = deadline
        if self._adapter.announces_end and drained and not self.with_state:
            for_requests = min(deadline, time.monotonic() + _FOR_REQUESTS)
        waited_for = [hosted for hosted in self.connections if hosted not in but]
        look = _FIRST_LOOK
        self._quiet_by = 0.0
        while True:
            for hosted in self._ending:
                hosted.end()
            waited_for = [hosted for hosted in waited_for if busy(hosted)]
            # Who has just come has not been asked for a request yet: it must not stay. A TLS
            # client stays anyway, and may take its time.
            attaching = self._attaching if self._tls is None else self._arriving
            conversing = self._conversing(waited_for)
            patient = attaching or conversing or any(h.endless for h in waited_for)
            left = (deadline if patient else for_requests) - time.monotonic()
            if not (waited_for or attaching or conversing) or left <= 0:
                return not (waited_for or attaching)
            await asyncio.sleep(min(look, left))
            look = min(look * 1.5, _LAST_LOOK)

    def _conversing(self, waited_for: Sequence[HostedConnection]) -> bool:
        """Whether a handler of a connection without an end has sent something just now, and might go on
        with that: tasks of its own are not seen."""
        if not self._anew or waited_for:
            return False
        now = time.monotonic()
        self._quiet_by = self._quiet_by or now + _QUIET_AT_LAST
        return bool(now < min(self._adapter.last_said + _QUIET, self._quiet_by))

    def at_work(self) -> list[HostedConnection]:
        """Those that have something in hand, and may write to a state."""
        return [each for each in self.connections if self.with_state and each.at_work]

    def freeze(self) -> tuple[list[Frozen], list[LeftBehind]]:
        """What moves, and what stays and why. Nothing changes; nothing else may run meanwhile."""
        frozen: list[Frozen] = []
        left = list(self._told_to_end)
        self._moving = []
        if not self._crosses:
            told = {item.what for item in left}
            staying = [h.describe() for h in self.connections if not h.gone]
            left += [LeftBehind(self._name, w, _SWITCHED_OFF) for w in staying if w not in told]
            return frozen, left
        frozen = self._arrivals.freeze()
        for hosted in self.connections:
            match hosted.freeze():
                case Frozen() as item:
                    frozen.append(item)
                    self._moving.append(hosted)
                case LeftBehind() as item if item not in left:
                    left.append(item)
        why = "it has no transport yet"
        left += [LeftBehind(self._name, _BEING_ACCEPTED, why) for _ in self._attaching]
        return frozen, left

    def let_go(self) -> None:
        """All that was frozen last belongs to another instance, and stays open here for now."""
        for hosted in self._moving:
            self.suspended += hosted.endless
            hosted.let_go()
        moved = set(self._moving)
        self.connections = [hosted for hosted in self.connections if hosted not in moved]

    def close_copies(self) -> None:
        """Close our copies of all that was frozen last."""
        for hosted in self._moving:
            hosted.close_copy()
        self._arrivals.close_copies()

    def drop_rest(self) -> None:
        """Everything else is parked, and this process ends: what is left is cut."""
        for hosted in self.connections:
            if hosted.endless and self._adapter.says_goodbye and not hosted.told:
                hosted.close()  # one that could have moved, and was not at rest
            else:
                hosted.transport.abort()

    async def background_ended(self, deadline: float) -> None:
        """Wait until the application's tasks that there are now have ended, or for the deadline (of
        `time.monotonic`)."""
        if tasks := self._adapter.background():
            await asyncio.wait(tasks, timeout=max(deadline - time.monotonic(), 0))

    def finish(self, *, replaced: bool = False) -> None:
        """What is left ends here, each connection after what it is at. `replaced`: by an instance
        that owns the states. An idle connection may have one more answer then, if that can say that
        it was the last, or none if it might need a state."""
        self._over = True
        self._owns = not (replaced and self.with_state)
        self._one_more = replaced and self._owns and self._adapter.announces_end
        for hosted in self.connections:
            if self._owns:
                hosted.finish()
            else:
                hosted.end(answers=False)

    def in_hand(self) -> tuple[int, int]:
        """How many messages handlers wanted to send after their connections had moved, and of how many
        of these."""
        messages, connections = self._adapter.in_hand()
        return messages, connections

    def drain(self) -> list[str]:
        """Close what has become idle; what holds the drain, for people."""
        self.connections = [hosted for hosted in self.connections if not hosted.gone]
        for hosted in self.connections:
            if self._one_more:
                hosted.finish()
                hosted.end_if_idle(_LAST_REQUEST)
            else:
                hosted.end(answers=self._owns)
        left = [hosted.describe() for hosted in self.connections]
        if self._one_more:  # their answer is still to come; a TLS handshake takes a while
            left += [_BEING_ACCEPTED] * len(self._attaching)
        return left

    @property
    def to_be_told(self) -> list[HostedConnection]:
        """Those that have no end of their own, and can be told goodbye, but were not."""
        if not self._adapter.says_goodbye:
            return []
        return [each for each in self.connections if each.endless and not (each.told or each.gone)]

    async def cut(self) -> list[str]:
        """Time is up: say goodbye, then end what is left. Returns what was cut."""
        cut = self.drain()
        for hosted in self.connections:
            if hosted.idle and not hosted.endless:
                hosted.end(answers=self._owns)
            else:
                hosted.close()
        for task in self._attaching:
            task.cancel()
        deadline = time.monotonic() + _GRACE
        while not all(hosted.gone for hosted in self.connections):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_LAST_LOOK)
        for hosted in self.connections:
            hosted.transport.abort()
        return cut
