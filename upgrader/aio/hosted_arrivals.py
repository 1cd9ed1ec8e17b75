# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of a library that have moved here and have no transport yet."""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from upgrader.aio.adapter import Adapter
from upgrader.errors import UnreadableState
from upgrader.instance.save import Frozen

if TYPE_CHECKING:
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
        listener: str,
        adapter: Adapter,
        attach: Callable[[Adopted, asyncio.BaseProtocol], None],
    ) -> None:
        """`attach` begins to serve one."""
        self._loop = loop
        self._listener = listener
        self._adapter = adapter
        self._attach = attach
        self._waiting: dict[int, _Arrival] = {}  # by FD
        self._attaching: asyncio.Task[None] | None = None
        self._held = True

    def load(self, adopted: Adopted) -> None:
        """Load one, while the source can still resume; raises UnreadableState."""
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
