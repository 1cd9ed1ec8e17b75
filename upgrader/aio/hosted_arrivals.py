# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of a library that have moved here and have no transport yet."""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from upgrader.aio.hosted_connection import ANEW
from upgrader.aio.replays import LetIn, MovedAnew
from upgrader.errors import UnreadableState
from upgrader.instance.declarations import Protocols
from upgrader.instance.frozen import Frozen

if TYPE_CHECKING:  # TLS is loaded where its connections move
    from upgrader.aio.tls_layer import TlsCrossing
    from upgrader.instance.adopted import Adopted

_BATCH = 20  # connections adopted in one go; clients that have sent something come first
_log = logging.getLogger("upgrader")


@dataclass(frozen=True, slots=True)
class _Arrival:
    adopted: Adopted
    protocol: asyncio.BaseProtocol | None  # made beforehand where loading could fail


class Arrivals:
    """Those of one listener: each is attached between other work, or moves on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        declared: Protocols,
        attach: Callable[[Adopted, asyncio.BaseProtocol], None],
        let_in: LetIn,
    ) -> None:
        """`attach` begins to serve one; `let_in` goes on with one whose handler has begun anew."""
        self._loop = loop
        self._listener = declared.listener.name
        self._adapter = declared.adapter
        self._speaks_tls = declared.tls is not None
        self._crossing: TlsCrossing | None = declared.moving_tls
        self._attach = attach
        self._let_in = let_in
        self._anew: list[MovedAnew] = []  # those without an end
        self._waiting: dict[int, _Arrival] = {}  # by FD
        self._attaching: asyncio.Task[None] | None = None
        self._held = True

    def load(self, adopted: Sequence[Adopted]) -> None:
        """Load them, while the source can still resume; raises UnreadableState."""
        for item in self._only_tls(adopted) if self._speaks_tls else adopted:
            if item.state.session == ANEW:
                self._anew.append(MovedAnew(item, self._adapter, self._let_in, self._crossing))
            else:
                self._load(item)

    def _only_tls(self, adopted: Sequence[Adopted]) -> list[Adopted]:
        """A source that cannot know better has given away connections without TLS: they end here, as
        what their clients say is no handshake."""
        plain = [item for item in adopted if item.tls is None]
        for item in plain:
            item.close()
        if plain:
            _log.warning(
                "%s: %d connections without TLS end: this version speaks TLS there",
                self._listener, len(plain),
            )  # fmt: skip
        return [item for item in adopted if item.tls is not None]

    def take_anew(self) -> list[MovedAnew]:
        """Those without an end, whose handlers have to begin anew; they are not kept here any more."""
        anew, self._anew = self._anew, []
        return anew

    def _load(self, adopted: Adopted) -> None:
        protocol = None
        if adopted.state.session:
            try:
                protocol = self._adapter.load(adopted.state.session)
            except Exception as error:
                why = f"{self._adapter.speaks}: {type(error).__name__}: {error}"
                raise UnreadableState(f"a connection of {self._listener!r}", why) from error
        self._waiting[adopted.fileno()] = _Arrival(adopted, protocol)

    def open(self) -> None:
        """Attach them, from now on."""
        self._held = False
        if self._waiting and (self._attaching is None or self._attaching.done()):
            self._attaching = self._loop.create_task(self._attach_all())

    def close(self) -> None:
        """Attach no more of them for now."""
        self._held = True

    async def _attach_all(self) -> None:
        """Between other work: thousands of transports are a pause of their own."""
        with select.epoll() as readable:
            for number in self._waiting:
                readable.register(number, select.EPOLLIN)
            while self._waiting and not self._held:
                first = [number for number, _ in readable.poll(0, _BATCH)]
                for number in first or list(islice(self._waiting, _BATCH)):
                    readable.unregister(number)
                    self._attach_one(self._waiting.pop(number))
                await asyncio.sleep(0)

    def _attach_one(self, arrival: _Arrival) -> None:
        try:
            protocol = arrival.protocol or self._adapter.load(b"")
        except Exception:
            _log.exception("%s: adapter of %s failed", self._listener, self._adapter.speaks)
            arrival.adopted.close()
            return
        self._attach(arrival.adopted, protocol)

    def freeze(self) -> list[Frozen]:
        """All that have not been attached: they move on as they came."""
        waiting = [each.adopted for each in self._waiting.values()]
        return [
            Frozen(self._listener, w, w.identity, w.state, w.tls and w.tls.snapshot())
            for w in waiting
        ]

    def close_copies(self) -> None:
        """They have moved on: close our copies of their FDs."""
        for each in self._waiting.values():
            each.adopted.close()
        self._waiting.clear()
