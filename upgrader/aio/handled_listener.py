# SPDX-License-Identifier: LGPL-2.1-or-later
"""The connections of one listener that a handler of the program serves: accepted, adopted, frozen,
and ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from upgrader.aio.acceptor import Acceptor
from upgrader.aio.handled_connection import HandledConnection
from upgrader.aio.peer import Peer
from upgrader.aio.safe_points import SafePoints
from upgrader.aio.unheard import Unheard
from upgrader.aio.waiting import first, until_deadline
from upgrader.instance.connection import ConnectionStream
from upgrader.instance.declarations import Connections
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.aio.tls_layer import TlsCrossing
    from upgrader.instance import freeze
    from upgrader.instance.adopted import Adopted
    from upgrader.instance.adopted_crowd import AdoptedCrowd
    from upgrader.instance.frozen import Moving
    from upgrader.instance.interfaces import Open
    from upgrader.protocol import image
else:
    freeze = later("upgrader.instance.freeze")
    image = later("upgrader.protocol.image")


class _Served:
    """Who serves a connection: a task, unless its handler was done before it moved here."""

    __slots__ = ("peer", "task")

    def __init__(self, peer: Peer[Any], task: asyncio.Task[None] | None) -> None:
        self.peer = peer
        self.task = task


class HandledListener:
    """All connections of one declared `Connections`."""

    def __init__(
        self, declared: Connections, arguments: Mapping[str, Any], safe_points: SafePoints
    ) -> None:
        """`arguments`: the live states that the handler wants."""
        self._loop = asyncio.get_running_loop()
        self._name = declared.listener.name
        self._declared = declared
        self._arguments = arguments
        self._safe_points = safe_points
        self._crossing: TlsCrossing | None = declared.moving_tls
        self._acceptor = Acceptor(self._loop, declared.listener, self._accept)
        self._served: dict[HandledConnection, _Served] = {}
        self._moving: list[HandledConnection] = []
        self._unheard = Unheard(self._loop, self._adopt)
        self._moving_unheard: list[Adopted] = []
        self._moving_crowds: list[AdoptedCrowd] = []
        self._ended = asyncio.Event()  # one of them has

    @property
    def connections(self) -> Sequence[HandledConnection]:
        """Those that are open and have a handler; asked from any thread."""
        return list(self._served)

    @property
    def open_connections(self) -> Sequence[Open]:
        """The same, with those whose clients have said nothing since they have moved here."""
        return [*(connection.stream for connection in self.connections), *self._unheard.open]

    @property
    def peers(self) -> list[tuple[HandledConnection, Peer[Any]]]:
        """Those that are open, and how their handlers see them."""
        self._unheard.wake()
        return [(connection, served.peer) for connection, served in self._served.items()]

    @property
    def drains(self) -> bool:
        """Whether those that are busy may be left behind."""
        return self._declared.drains

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Their handlers."""
        return [served.task for served in self._served.values() if served.task]

    # The beginning

    def adopt(self, adopted: Adopted) -> None:
        """Take in a connection that has moved here."""
        lazy = self._declared.lazy and adopted.tls is None  # what came may lie here, sealed
        if not (lazy and self._unheard.take(adopted)):
            self._adopt(adopted)

    def adopt_crowd(self, crowd: AdoptedCrowd) -> None:
        """Take in connections that are alike."""
        if self._declared.lazy:
            self._unheard.take_crowd(crowd)
            return
        for number in crowd.numbers:
            self._adopt(crowd.take(number))

    def _adopt(self, adopted: Adopted) -> None:
        """Call the handler anew."""
        stream = self._stream(adopted)
        connection = self._make(stream, adopted.session, adopted=True)
        if stream.unsent:
            connection.flush()
        # If its handler was done, only unsent bytes are left.
        self._serve(connection, handled=adopted.state.waiting is not Waiting.CLOSING)

    def open(self) -> None:
        """Accept whoever comes, and hear whoever is here."""
        self._acceptor.open()
        self._unheard.listen()

    def _accept(self, sock: socket.socket) -> None:
        session = self._declared.session() if self._declared.session else None
        context = self._declared.tls
        if context is None:
            stream = ConnectionStream(sock)
        else:
            from upgrader.aio import tls_stream

            stream = tls_stream.TlsStream(sock, context, self._crossing)
        self._serve(self._make(stream, session, adopted=False), handled=True)

    def _stream(self, adopted: Adopted) -> ConnectionStream:
        state, identity = adopted.state, adopted.identity
        if adopted.tls is None:  # of one over TLS, it may be that only sealed bytes are left
            return ConnectionStream(adopted.take(), state, identity)
        from upgrader.aio import tls_stream

        return tls_stream.TlsStream(
            adopted.take(), self._declared.tls, self._crossing, state, identity, adopted.tls
        )

    def _make(
        self, stream: ConnectionStream, session: object, *, adopted: bool
    ) -> HandledConnection:
        return HandledConnection(
            self._name, stream, session, self._safe_points, self._forget, adopted=adopted
        )

    def _serve(self, connection: HandledConnection, *, handled: bool) -> None:
        peer: Peer[Any] = Peer(connection)
        task = None
        if handled:
            handler = functools.partial(self._declared.handler, peer, **self._arguments)
            task = self._loop.create_task(connection.run(handler))
        self._served[connection] = _Served(peer, task)

    def _forget(self, connection: HandledConnection) -> None:
        self._served.pop(connection, None)
        self._ended.set()

    # The end of serving

    def ask_tls(self, *, live: bool, trust: str | None) -> None:
        """Find out whether TLS connections may move; as `TlsCrossing.ask`."""
        if self._crossing:
            self._crossing.ask(live=live, trust=trust)

    def finish_staying(self) -> None:
        """Those that cannot move end here, each after what its handler is at."""
        for connection in self._served:
            if connection.stream.why_it_stays:
                connection.finish()

    def hold(self) -> None:
        """Accept no more, and let handlers come to a safe point."""
        for connection in self._served:
            connection.hold()
        self._acceptor.close()
        self._unheard.hold()

    def resume(self) -> None:
        """Go on as before `hold`."""
        for connection in self._served:
            connection.resume()
        self.open()

    def freeze(self, *, crosses: bool) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes. `crosses`: backend-transfer is on."""
        self._moving, self._moving_unheard, self._moving_crowds = [], [], []
        if not crosses:
            why = "backend-transfer=no"
            return [], [image.LeftBehind(self._name, each.address, why) for each in self._served]
        frozen, left, self._moving = freeze.freeze_all(self._name, self._served)
        # Looked up once: there may be thousands.
        freeze_again, stays = freeze.freeze_again, image.LeftBehind
        for adopted in self._unheard.all:
            item = freeze_again(adopted)
            if isinstance(item, stays):
                left.append(item)
            else:
                frozen.append(item)
                self._moving_unheard.append(adopted)
        self._moving_crowds = [*self._unheard.crowds]
        frozen += [crowd.freeze() for crowd in self._moving_crowds]
        return frozen, left

    def let_go(self) -> None:
        """All that was frozen last belongs to another instance, and stays open here for now."""
        for connection in self._moving:
            connection.let_go()
            self._forget(connection)
        self._unheard.forget(self._moving_unheard)

    def close_copies(self) -> None:
        """Close our copies of all that was frozen last: else their clients would not see that the
        next instance closes them."""
        for connection in self._moving:
            connection.close_copy()
        for adopted in self._moving_unheard:
            adopted.close()
        for crowd in self._moving_crowds:
            crowd.close()
        self._unheard.end()

    def finish(self) -> None:
        """What is left ends here, each connection after what its handler is at."""
        self._unheard.wake()
        for connection in self._served:
            connection.finish()

    def close_unheard(self) -> None:
        """Close those for which no handler runs."""
        self._unheard.close()

    async def all_ended(self, deadline: float, stop: asyncio.Event | None = None) -> None:
        """Wait until all have ended, for the deadline (of `time.monotonic`), or for `stop`."""
        events = [self._ended, stop] if stop else [self._ended]
        while self._served and not (stop and stop.is_set()):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._ended.clear()
            await first(left, *events)

    async def all_sent(self, deadline: float) -> None:
        """Wait until all that was written is sent, or for the deadline, but for a second at least."""
        with contextlib.suppress(TimeoutError):
            async with until_deadline(deadline):
                while any(connection.unsent for connection in self._served):
                    self._ended.clear()
                    await self._ended.wait()
