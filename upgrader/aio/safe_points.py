# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell which connections with a handler are at a safe point, and whether they may leave it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


class SafePoints:
    """Those of one instance. A gate is before all that a handler could be given: it is closed while
    an instance begins, and while its connections are collected."""

    def __init__(self) -> None:
        self._closed = True
        self._held: frozenset[str] = (
            frozenset()
        )  # listeners whose connections are kept all the same
        self._opened = asyncio.Event()  # the next time
        self._busy: dict[object, float] = {}  # since when, of `time.monotonic`
        self._coming: set[object] = set()  # adopted; its handler has not waited for anything yet
        #: For each wait that lets them go on: which were busy when it began, and have been since.
        self._passing: list[set[object]] = []
        self._changed = asyncio.Event()

    # For connections

    def mark(self, connection: object, *, busy: bool) -> None:
        """Note whether a connection is at a safe point."""
        if busy:
            self._busy[connection] = time.monotonic()
            return
        self._busy.pop(connection, None)
        for passing in self._passing:
            passing.discard(connection)
        self._changed.set()

    def expect(self, connection: object) -> None:
        """A handler is called anew for a connection that was adopted."""
        self._coming.add(connection)

    def arrive(self, connection: object) -> None:
        """Its handler waits for something for the first time, or has ended."""
        self._coming.discard(connection)
        self._changed.set()

    async def pass_gate(self, listener: str) -> None:
        """Wait while the gate is closed for connections of this listener."""
        while self._closed or listener in self._held:
            await self._opened.wait()

    # For the instance

    def open(self, but: frozenset[str] = frozenset()) -> None:
        """Let handlers go on, but for those of some listeners."""
        self._closed, self._held = False, but
        opened, self._opened = self._opened, asyncio.Event()
        opened.set()

    def close(self) -> None:
        """Let no handler leave its safe point."""
        self._closed = True

    async def all_come(self, limit: float) -> int:
        """Wait until each handler that was called anew has come to its first wait, for at most
        `limit` seconds; returns how many have not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self._coming:
                    await self.change()
        return len(self._coming)

    async def all_safe(self, connections: Collection[object], deadline: float) -> None:
        """Wait until these are at safe points, or for the deadline (of `time.monotonic`)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                while not self._busy.keys().isdisjoint(connections):
                    await self.change()

    def busy_among(self, connections: Iterable[T]) -> dict[T, float]:
        """Those of these connections that are not at a safe point, with since when, as of
        `time.monotonic`."""
        return {each: self._busy[each] for each in connections if each in self._busy}

    async def all_passed(
        self, connections: Collection[object], deadline: float
    ) -> frozenset[object]:
        """Wait until each of these has been at a safe point once, or for the deadline (of
        `time.monotonic`); meanwhile they go on. Returns those that have not."""
        passing = self._busy.keys() & set(connections)
        self._passing.append(passing)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                while passing:
                    await self.change()
        except TimeoutError:
            pass
        finally:
            self._passing = [each for each in self._passing if each is not passing]
        return frozenset(passing)

    async def change(self) -> None:
        """Wait until something has changed for one of them: it has come to a safe point, or has
        ended."""
        self._changed.clear()
        await self._changed.wait()
