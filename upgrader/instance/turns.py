# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: stretches of work that a migration must not cut in two.

Threads and tasks take part with `with instance.turn():` (tasks: `async with`). A migration first
closes the turns, which lets running ones end and makes new ones wait, and freezes when none runs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upgrader.instance.process import in_loop
from upgrader.protocol.values import Value

if TYPE_CHECKING:  # loaded only by those who use it
    import asyncio


#: Seconds between two tries of a migration to hold everything at once, in which all are served.
PAUSES = (1.0, 2.0, 4.0)
_WITHOUT_DIGITS = str.maketrans("", "", "0123456789")
_MOST = 256  # kinds that are told apart
_COMPARED = 100  # turns of a kind that are remembered
#: The turn that this thread or task is inside of, or was started by.
_inside: ContextVar[int] = ContextVar("upgrader_turn", default=0)
#: The listener and the task of the handler that has started this thread or task; until that has had a turn.
#: A task has this in its own context, so a strong reference would keep it after its end.
_started_by: ContextVar[tuple[str, weakref.ref[Any]] | None] = ContextVar(
    "upgrader_handler", default=None
)


def begins_handler(listener: str) -> None:
    """In a task: it runs the handler of a connection of this listener. What that starts, and may have
    answered for, begins its first turn even while turns are held: it would be gone otherwise."""
    import asyncio

    task = asyncio.current_task()
    assert task
    _started_by.set((listener, weakref.ref(task)))


class _Running:
    """A turn that runs; `since` is of `time.monotonic`, `listener` is the one whose handler has started
    it, or empty."""

    __slots__ = ("listener", "name", "since")

    def __init__(self, name: str, listener: str) -> None:
        self.name = name
        self.listener = listener
        self.since = time.monotonic()


def kind(name: str) -> str:
    """What a thread or a task is one of: its name without its number."""
    return name.translate(_WITHOUT_DIGITS)


class Settled(Value):
    """What a first wait has come to: which turns and handlers are busy still, and which connections
    of other libraries would be cut, for people."""

    busy: list[str]
    cut: list[str]


class Turns:
    """All turns of one instance."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: dict[int, _Running] = {}  # by number
        self._lengths: dict[str, deque[float]] = {}  # of the last turns of a kind, in seconds
        self._numbers = itertools.count(1)
        self._watching: list[Callable[[], object]] = []
        self._closed = False
        self._held = frozenset[str]()  # kinds of which none may begin, though others may
        self._reopened: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def turn(self) -> Turn:
        """A new turn, to be entered once."""
        return Turn(self)

    @property
    def running(self) -> dict[int, str]:
        """The turns that run now: their numbers, and the names of their threads and tasks."""
        with self._condition:
            return {number: each.name for number, each in self._running.items()}

    def shown(self, numbers: Collection[int]) -> list[str]:
        """Those of these turns that run, for people: since when, and how long others of that kind
        take."""
        now = time.monotonic()
        with self._condition:
            return [
                f"the turn of {each.name} for {now - each.since:.1f} s{self._compared(each.name)}"
                for number, each in self._running.items()
                if number in numbers
            ]

    def _compared(self, name: str) -> str:
        lengths = sorted(self._lengths.get(kind(name), ()))
        if not lengths:
            return ""
        return f" (the last {len(lengths)} like it: p99 {lengths[len(lengths) * 99 // 100]:.1f} s)"

    def kinds(self, but: Collection[int]) -> frozenset[str]:
        """The kinds of the turns that run and that no handler has started, but for those of some
        numbers."""
        with self._condition:
            return frozenset(
                kind(each.name)
                for number, each in self._running.items()
                if number not in but and not each.listener
            )

    def listeners(self, but: Collection[int]) -> frozenset[str]:
        """The listeners whose handlers have started turns that run, but for those of some numbers."""
        with self._condition:
            return frozenset(
                each.listener
                for number, each in self._running.items()
                if number not in but and each.listener
            )

    def of(
        self, kinds: Collection[str], listeners: Collection[str] = frozenset()
    ) -> frozenset[int]:
        """The numbers of the turns that run now and are of these kinds, or started by a handler of
        these listeners."""
        with self._condition:
            return frozenset(
                number
                for number, each in self._running.items()
                if (each.listener in listeners if each.listener else kind(each.name) in kinds)
            )

    def begun(self) -> frozenset[int]:
        """The numbers of the turns that run now."""
        with self._condition:
            return frozenset(self._running)

    def run_still(self, numbers: Collection[int]) -> bool:
        """Whether one of these turns has not ended."""
        with self._condition:
            return not self._running.keys().isdisjoint(numbers)

    def watch(self, told: Callable[[], object]) -> None:
        """Have `told` called, from any thread, whenever a turn has ended, until `unwatch`."""
        with self._condition:
            self._watching.append(told)

    def unwatch(self, told: Callable[[], object]) -> None:
        """Call it no more."""
        with self._condition:
            self._watching.remove(told)

    def wait_ended(self, numbers: Collection[int], seconds: float) -> bool:
        """In a thread: wait until all of these have ended; returns whether they have in time."""
        with self._condition:
            return self._condition.wait_for(lambda: not self.run_still(numbers), _bounded(seconds))

    def wait_idle(self, seconds: float, stuck: Collection[int] = ()) -> bool:
        """In a thread: wait until none but the `stuck` ones run; returns whether that is so."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._running.keys() <= set(stuck), _bounded(seconds)
            )

    def close(self) -> None:
        """Let no new turn begin, but inside of one that runs."""
        with self._condition:
            self._closed = True

    def open(self, but: frozenset[str] = frozenset()) -> None:
        """Let turns begin again, but for some kinds of them."""
        with self._condition:
            self._closed = False
            self._held = but
            for loop, event in self._reopened:
                loop.call_soon_threadsafe(event.set)
            self._reopened.clear()
            self._condition.notify_all()

    def enter(self, name: str, *, wait: bool) -> int:
        """Begin a turn, after waiting while turns are closed (`wait`); returns its number."""
        with self._condition:
            while wait and self._is_held(name) and not self._nested() and not _handler():
                self._condition.wait()
            return self._begin(name)

    def leave(self, number: int) -> None:
        """End a turn."""
        with self._condition:
            ended = self._running.pop(number)
            if len(self._lengths) > _MOST:
                self._lengths.clear()
            lengths = self._lengths.setdefault(kind(ended.name), deque(maxlen=_COMPARED))
            lengths.append(time.monotonic() - ended.since)
            self._condition.notify_all()
            for told in self._watching:
                told()

    def _is_held(self, name: str) -> bool:
        return self._closed or (bool(self._held) and kind(name) in self._held)

    def _nested(self) -> bool:
        # The turn around it, or that started this task, waits for it: to make it wait is a deadlock.
        return _inside.get() in self._running

    def _begin(self, name: str) -> int:
        number = next(self._numbers)
        self._running[number] = _Running(name, _handler())
        return number

    async def enter_task(self, name: str) -> int:
        """Begin a turn in a task, after waiting while turns are closed; returns its number."""
        import asyncio

        while True:
            with self._condition:
                if not self._is_held(name) or self._nested() or _handler():
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
        self._number = self._turns.enter(threading.current_thread().name, wait=not in_loop())
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
        if _handler():
            _started_by.set(None)
        self._turns.leave(self._number)


def _handler() -> str:
    """The listener whose handler has started this task or thread, which has had no turn yet; the
    handler itself is at no safe point in a turn, so its turns are as others."""
    started_by = _started_by.get()
    if started_by is None:
        return ""
    listener, handler = started_by
    if in_loop():
        import asyncio

        task = asyncio.current_task()
        return "" if task is not None and task is handler() else listener
    return listener


def _bounded(seconds: float) -> float:
    return max(0.0, min(seconds, threading.TIMEOUT_MAX))
