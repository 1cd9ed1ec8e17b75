# SPDX-License-Identifier: LGPL-2.1-or-later
"""Call what an author has declared to be done before a freeze, and after having been replaced: in threads,
because a function that hangs cannot be ended."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any

from upgrader.errors import QuiesceFailed
from upgrader.instance.declarations import Declarations

#: Has a coroutine run on the loop of the instance, from another thread.
Spawn = Callable[[Coroutine[Any, Any, object]], Future[object]]
_log = logging.getLogger("upgrader")


@dataclass(slots=True, eq=False)
class _Run:
    """One call of a function, and one more if that was wanted meanwhile."""

    call: Callable[[], object]
    name: str
    ended: Future[None] = field(default_factory=Future)
    again: bool = False


class AuthorCalls:
    """The functions of `instance.quiesce`, `instance.resumed` and `instance.replaced`."""

    def __init__(self, declarations: Declarations, spawn: Spawn | None = None) -> None:
        """`spawn`: for a program with a loop."""
        self._declarations = declarations
        self._spawn = spawn
        self._lock = threading.Lock()
        self._runs: dict[Callable[..., Any], _Run] = {}

    def quiesce(self) -> AuthorRound:
        """Begin a round: each function is called, or once more if it runs still from the round before."""
        with self._lock:
            return AuthorRound([self._begin(each) for each in self._declarations.quiesces])

    def resumed(self) -> None:
        """Nothing is held any more: begin to call what is declared for that; nobody waits for it."""
        if self._declarations.resumptions:
            with self._lock:
                runs = [self._begin(each) for each in self._declarations.resumptions]
            for run in runs:
                run.ended.add_done_callback(lambda _, run=run: _tell_failure(run))  # type: ignore[misc]

    def replaced(self) -> AuthorRound:
        """Call what is declared for the end of an instance that another one goes on from."""
        with self._lock:
            return AuthorRound([self._begin(each) for each in self._declarations.farewells])

    def _begin(self, function: Callable[..., Any]) -> _Run:
        run = self._runs.get(function)
        if run and not run.ended.done():
            run.again = True
            return run
        values = self._declarations.values(function)
        name = getattr(function, "__qualname__", repr(function))
        run = self._runs[function] = _Run(lambda: function(**values), name)
        self._start(run)
        return run

    def _start(self, run: _Run) -> None:
        threading.Thread(target=self._work, args=(run,), name=run.name, daemon=True).start()

    def _work(self, run: _Run) -> None:
        try:
            result = run.call()
            running = self._spawn(result) if inspect.iscoroutine(result) and self._spawn else None
        except BaseException as error:
            self._over(run, error)
            return
        if running:
            # Who waits for it may be on that loop: no thread has to wake up in between.
            running.add_done_callback(lambda done: self._over(run, _error(done)))
        else:
            self._over(run, None)

    def _over(self, run: _Run, error: BaseException | None) -> None:
        if error:
            run.ended.set_exception(error)
            return
        with self._lock:
            if not run.again:
                run.ended.set_result(None)
                return
            run.again = False
        self._start(run)


def _error(done: Future[object]) -> BaseException | None:
    """What it has raised."""
    return CancelledError() if done.cancelled() else done.exception()


def _tell_failure(run: _Run) -> None:
    if error := run.ended.exception():
        _log.error(
            "%s, called because this instance serves on, has failed", run.name, exc_info=error
        )


class AuthorRound:
    """One round of calls."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._runs = runs

    @property
    def futures(self) -> list[Future[None]]:
        """What is waited for, one for each function."""
        return [run.ended for run in self._runs]

    @property
    def late(self) -> list[str]:
        """Those that run still, for people."""
        return [f"the function {run.name}" for run in self._runs if not run.ended.done()]

    def wait(self, seconds: float) -> bool:
        """In a thread of its own: wait until all have ended; returns whether they have."""
        wait(self.futures, max(seconds, 0))
        return not self.late

    def require(self) -> None:
        """Raise QuiesceFailed if one has raised."""
        for run in self._runs:
            if run.ended.done() and (error := run.ended.exception()):
                raise QuiesceFailed(run.name, error) from error

    def log(self, what: str) -> None:
        """Say what has not worked out; `what` it was called for."""
        for run in self._runs:
            if not run.ended.done():
                _log.error("%s has not ended in time: called for %s", run.name, what)
            elif error := run.ended.exception():
                _log.error("%s, called for %s, has failed", run.name, what, exc_info=error)
