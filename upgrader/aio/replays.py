# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections without an end that have moved here: all their handlers begin anew before any client is let in.

Otherwise the first of them to say something would reach only those that have begun by then. A handler
that has failed, or does not wait for its client in time, has its client dial again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from upgrader.aio.adapter import Adapter, Replay
from upgrader.protocol.collector import no_collection
from upgrader.protocol.values import Value

if TYPE_CHECKING:
    from upgrader.aio.tls_layer import TlsCrossing, TlsLayer  # loaded where TLS connections move
    from upgrader.instance.adopted import Adopted

_JUDGED = 50  # of the first so many, more than half have to go on; else the others are not asked
_BATCH = 20  # clients that are let in at one go
_TO_LEAVE = 1.0  # seconds for a client that is told goodbye to close
_LOOK = 0.02  # seconds
_log = logging.getLogger("upgrader")

#: What becomes of a connection that goes on: its transport, its library's protocol, and what lies below a
#: transport of TLS.
LetIn = Callable[["Adopted", asyncio.Transport, asyncio.Protocol, "TlsLayer | None"], object]


class Replayed(Value):
    """How many connections without an end go on here, and how many were told to dial again; in how many
    seconds their handlers had begun."""

    moved: int
    refused: int
    seconds: float


class MovedAnew:
    """A connection without an end that has moved here, and who makes its handler begin anew."""

    def __init__(
        self, adopted: Adopted, adapter: Adapter, let_in: LetIn, tls: TlsCrossing | None
    ) -> None:
        """`tls`: how the TLS connections of its listener go on, if they do."""
        self.adopted = adopted
        self.adapter = adapter
        self.let_in = let_in
        self._tls = tls

    async def connect(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol
    ) -> TlsLayer | None:
        """Give its socket a transport, and that to a protocol; raises whatever the loop does."""
        sock = self.adopted.take()
        try:
            if self._tls and self.adopted.tls:
                transport, layer = await self._tls.connect(loop, sock, protocol, self.adopted.tls)
                protocol.connection_made(transport)
                return layer
            await loop.connect_accepted_socket(lambda: protocol, sock)
        except Exception:
            sock.close()
            raise
        return None


class Replays:
    """Those of one instance."""

    def __init__(self, arrivals: Sequence[MovedAnew], patience: float, spread: float) -> None:
        """`patience`: seconds for each handler to begin; `spread`: seconds over which goodbyes are
        said."""
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._arrivals = arrivals
        self._spread = spread
        self.moved = 0  #: handlers that go on here
        self.refused = 0  #: whose clients were told to dial again
        self._begun: list[_Beginning] = []
        self._unasked: list[MovedAnew] = []
        self._goodbyes: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    async def run(self) -> Replayed:
        """Have all handlers begin, then let their clients in; goodbyes are said meanwhile."""
        began = time.monotonic()
        with no_collection():  # it would look at all that has begun, again and again
            await self._begin_all()
        if waiting := self._undecided():
            await asyncio.wait(waiting)
        seconds = time.monotonic() - began
        refused = []
        begun, self._begun = self._begun, []  # nothing of theirs is kept, nor of their handshakes
        for each in begun:
            if each.failed:
                refused.append(each)
                continue
            each.let_in()
            self.moved += 1
            if self.moved % _BATCH == 0:
                await asyncio.sleep(0)
        refused += [_Beginning(each) for each in self._unasked]
        self._arrivals, self._unasked = (), []
        self.refused = len(refused)
        if refused:
            self._goodbyes = self._loop.create_task(self._say_goodbyes(refused))
        return Replayed(self.moved, self.refused, round(seconds, 6))

    @property
    def waiting(self) -> int:
        """How many handlers are still to begin; asked from any thread."""
        return len(self._arrivals) - sum(each.decided for each in tuple(self._begun))

    async def _begin_all(self) -> None:
        """One after the other, with the loop in between: whatever else runs here waits for one at most."""
        for number, arrival in enumerate(self._arrivals):
            if number == _JUDGED and await self._hopeless():
                self._unasked = list(self._arrivals[number:])
                break
            await self._begin(arrival)

    async def end(self) -> None:
        """This instance ends: say all goodbyes at once."""
        self._hurry.set()
        if self._goodbyes:
            await asyncio.wait([self._goodbyes])

    def _undecided(self) -> list[asyncio.Future[bool]]:
        futures = [each.replay.decided for each in self._begun if each.replay]
        return [future for future in futures if future and not future.done()]

    async def _hopeless(self) -> bool:
        """Whether more than half of those that have begun are refused, or will not begin in time."""
        while waiting := self._undecided():
            failed = sum(each.failed for each in self._begun)
            if 2 * failed > _JUDGED or 2 * (_JUDGED - len(waiting) - failed) >= _JUDGED:
                break
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return 2 * sum(each.failed for each in self._begun) > _JUDGED

    async def _begin(self, arrival: MovedAnew) -> None:
        beginning = _Beginning(arrival)
        self._begun.append(beginning)
        try:
            beginning.replay = replay = arrival.adapter.replay(arrival.adopted.secret)
        except Exception as error:
            # Its text might have something of the handshake.
            _log.debug("a connection does not go on: %s", type(error).__name__)
        else:
            self._loop.call_later(self._patience, _refuse_if_late, replay)
        await beginning.connect(self._loop)

    async def _say_goodbyes(self, left: list[_Beginning]) -> None:
        """One after the other: clients that are all told at once all dial again at once."""
        began = time.monotonic()
        total = len(left)
        while left:
            passed = time.monotonic() - began
            over = self._hurry.is_set() or passed >= self._spread
            due = total if over else int(total * passed / self._spread) + 1
            for each in left[: len(left) - (total - due)]:
                await each.say_goodbye(self._loop)
            del left[: len(left) - (total - due)]
            if left:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), _LOOK)


def _refuse_if_late(replay: Replay) -> None:
    if replay.decided and not replay.decided.done():
        replay.refuse()


class _Beginning(asyncio.Protocol):
    """Stands between the transport and the library until all handlers have begun, and keeps what comes."""

    def __init__(self, arrival: MovedAnew) -> None:
        self.replay: Replay | None = None
        self._arrival = arrival
        self._transport: asyncio.Transport | None = None
        self._layer: TlsLayer | None = None
        self._held = bytearray()
        self._ended = False  # the client sends no more
        self._lost = False

    @property
    def failed(self) -> bool:
        """Whether its handler does not go on where it was."""
        return self.replay is None or self.replay.refused or self._lost

    @property
    def decided(self) -> bool:
        """Whether its handler has come to wait for its client, or has failed."""
        future = self.replay.decided if self.replay else None
        return self.failed or (future is not None and future.done())

    async def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the socket a transport, and begin."""
        try:
            self._layer = await self._arrival.connect(loop, self)
        except Exception as error:  # a peer that is gone by now
            _log.debug("a connection that has moved: %s: %s", type(error).__name__, error)
            self._lost = True

    def let_in(self) -> None:
        """Give the transport to the library, and what the client has sent."""
        assert self._transport
        assert self.replay
        transport, protocol = self._transport, cast(asyncio.Protocol, self.replay.protocol)
        adopted = self._arrival.adopted
        transport.set_protocol(protocol)
        self.replay.let_in()
        self._arrival.let_in(adopted, transport, protocol, self._layer)
        transport.resume_reading()  # before the library may pause it again
        if data := adopted.state.unread + self._held:
            protocol.data_received(data)
        if self._ended and not protocol.eof_received():
            transport.close()

    async def say_goodbye(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the client dial again. Its library is told that it is gone."""
        farewell = _Farewell(self._arrival.adapter.goodbye)
        if self._lost:
            return
        if self._transport is None:
            with contextlib.suppress(OSError):
                await self._arrival.connect(loop, farewell)
            return
        self._transport.set_protocol(farewell)
        farewell.connection_made(self._transport)
        self._tell_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast(asyncio.Transport, transport)
        made.pause_reading()
        if self.replay is None or self._lost:
            return
        try:
            self.replay.begin(made)
        except Exception:
            _log.exception("a handler cannot begin anew")
            self.replay.refuse()

    def data_received(self, data: bytes) -> None:
        self._held += data
        if self._transport:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        return True

    def pause_writing(self) -> None:
        if self.replay:
            self.replay.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self.replay:
            self.replay.protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._tell_lost(exc)

    def _tell_lost(self, exc: Exception | None) -> None:
        if self.replay:
            self.replay.refuse()
            with contextlib.suppress(Exception):
                self.replay.protocol.connection_lost(exc)


class _Farewell(asyncio.Protocol):
    """Says goodbye and waits for the end, because a close with something unread might undo that."""

    def __init__(self, goodbye: bytes) -> None:
        self._goodbye = goodbye

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        made.write(self._goodbye)
        made.resume_reading()
        asyncio.get_running_loop().call_later(_TO_LEAVE, made.abort)
