# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: stretches of work that a migration must not cut in two; knows no loop and no FD.

Threads and tasks take part with `with instance.turn():` (tasks: `async with`). A migration first
closes the turns, which lets running ones end and makes new ones wait, and freezes when none runs.
"""

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded only by those who use it
    import asyncio


class Turns:
    """All turns of one instance."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: list[str] = []
        self._closed = False
        self._on_idle: Callable[[], object] = lambda: None
        self._reopened: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def turn(self) -> "Turn":
        """A new turn, to be entered once."""
        return Turn(self)

    @property
    def running(self) -> list[str]:
        """Names of the threads and tasks inside a turn."""
        with self._condition:
            return list(self._running)

    def close(self, on_idle: Callable[[], object]) -> None:
        """Let no new turn begin; `on_idle` is called, from any thread, when the last one ends."""
        with self._condition:
            self._closed = True
            self._on_idle = on_idle
            if not self._running:
                on_idle()

    def open(self) -> None:
        """Let turns begin again."""
        with self._condition:
            self._closed = False
            self._on_idle = lambda: None
            for loop, event in self._reopened:
                loop.call_soon_threadsafe(event.set)
            self._reopened.clear()
            self._condition.notify_all()

    def enter(self, name: str, *, wait: bool) -> None:
        """Begin a turn, after waiting while turns are closed (`wait`)."""
        with self._condition:
            while wait and self._closed:
                self._condition.wait()
            self._running.append(name)

    def leave(self, name: str) -> None:
        """End a turn."""
        with self._condition:
            self._running.remove(name)
            if self._closed and not self._running:
                self._on_idle()

    async def enter_task(self, name: str) -> None:
        """Begin a turn in a task, after waiting while turns are closed."""
        import asyncio

        while True:
            with self._condition:
                if not self._closed:
                    self._running.append(name)
                    return
                event = asyncio.Event()
                self._reopened.append((asyncio.get_running_loop(), event))
            await event.wait()


class Turn:
    """One turn, as a context manager for threads (`with`) and tasks (`async with`)."""

    __slots__ = ("_name", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._name = ""

    def __enter__(self) -> None:
        self._name = threading.current_thread().name
        # A loop's own thread must not wait for itself; a freeze cannot happen inside a callback.
        self._turns.enter(self._name, wait=not _in_loop())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.leave(self._name)

    async def __aenter__(self) -> None:
        import asyncio

        task = asyncio.current_task()
        self._name = task.get_name() if task else "task"
        await self._turns.enter_task(self._name)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.leave(self._name)


def _in_loop() -> bool:
    return "asyncio" in sys.modules and sys.modules["asyncio"]._get_running_loop() is not None
