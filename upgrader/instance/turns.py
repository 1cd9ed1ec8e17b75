# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: stretches of work that a migration must not cut in two; knows no loop and no FD.

Threads and tasks take part with `with instance.turn():` (tasks: `async with`). A migration first
closes the turns, which lets running ones end and makes new ones wait, and freezes when none runs.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Collection
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded only by those who use it
    import asyncio


#: Seconds between two tries of a migration to hold everything at once, in which all are served.
PAUSES = (1.0, 2.0, 4.0)
#: The turn that this thread or task is inside of, or was started by.
_inside: ContextVar[int] = ContextVar("upgrader_turn", default=0)


class Turns:
    """All turns of one instance."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: dict[int, str] = {}  # by number
        self._numbers = itertools.count(1)
        self._on_end: Callable[[], object] = lambda: None
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
            return list(self._running.values())

    def begun(self) -> frozenset[int]:
        """The numbers of the turns that run now."""
        with self._condition:
            return frozenset(self._running)

    def run_still(self, numbers: Collection[int]) -> bool:
        """Whether one of these turns has not ended."""
        with self._condition:
            return not self._running.keys().isdisjoint(numbers)

    def on_end(self, told: Callable[[], object]) -> None:
        """Have `told` called, from any thread, whenever a turn has ended."""
        with self._condition:
            self._on_end = told

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

    def enter(self, name: str, *, wait: bool) -> int:
        """Begin a turn, after waiting while turns are closed (`wait`); returns its number."""
        with self._condition:
            while wait and self._closed and not self._nested():
                self._condition.wait()
            return self._begin(name)

    def leave(self, number: int) -> None:
        """End a turn."""
        with self._condition:
            del self._running[number]
            self._on_end()
            if self._closed and not self._running:
                self._on_idle()

    def _nested(self) -> bool:
        # The turn around it, or that started this task, waits for it: to make it wait is a deadlock.
        return _inside.get() in self._running

    def _begin(self, name: str) -> int:
        number = next(self._numbers)
        self._running[number] = name
        return number

    async def enter_task(self, name: str) -> int:
        """Begin a turn in a task, after waiting while turns are closed; returns its number."""
        import asyncio

        while True:
            with self._condition:
                if not self._closed or self._nested():
                    return self._begin(name)
                event = asyncio.Event()
                self._reopened.append((asyncio.get_running_loop(), event))
            await event.wait()


class Turn:
    """One turn, as a context manager for threads (`with`) and tasks (`async with`)."""

    __slots__ = ("_around", "_number", "_turns")

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._number = 0
        self._around: Token[int] | None = None

    def __enter__(self) -> None:
        # A loop's own thread must not wait for itself; a freeze cannot happen inside a callback.
        self._number = self._turns.enter(threading.current_thread().name, wait=not _in_loop())
        self._around = _inside.set(self._number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    async def __aenter__(self) -> None:
        import asyncio

        task = asyncio.current_task()
        self._number = await self._turns.enter_task(task.get_name() if task else "task")
        self._around = _inside.set(self._number)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._around is not None:
            with contextlib.suppress(ValueError):  # left by another task than the one that entered
                _inside.reset(self._around)
        self._turns.leave(self._number)


def _in_loop() -> bool:
    return "asyncio" in sys.modules and sys.modules["asyncio"]._get_running_loop() is not None
