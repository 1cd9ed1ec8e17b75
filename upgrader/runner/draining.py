# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draining the programs of earlier runners, once the one of this runner serves."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import field

import upgrader
from upgrader.instance.handles import Declared
from upgrader.protocol.programs import MOST_DRAINED
from upgrader.runner.adapter import ProgramAdapter
from upgrader.runner.host import PROGRAM, Host, in_thread, leader
from upgrader.runner.kept_paths import Paths
from upgrader.runner.processes import HARD, RunningProcess, age, end, session

#: For the oldest of more than are drained: it may hear only now that it was replaced, and answers whom it has
#: accepted.
_BRIEF = 2.0  # seconds
_log = logging.getLogger("upgrader")


@upgrader.state("upgrader-run")
class ToldToDrain:
    """Programs that were told to drain, by PID: they are not told twice."""

    pids: list[int] = field(default_factory=list)


class Draining:
    """All that is drained beside one program."""

    def __init__(
        self, host: Host, adapter: ProgramAdapter, paths: Paths, told: Declared[ToldToDrain]
    ) -> None:
        self._host = host
        self._adapter = adapter
        self._paths = paths
        self._told = told
        self._drains: list[asyncio.Future[None]] = []

    def begin(self, program: RunningProcess) -> None:
        """Begin to drain all but this one: of more than two, the oldest ends soon."""
        own, limit = f"{PROGRAM}{program.pid}", self._host.options.drain_limit
        old = {name: each for name, each in self._host.programs().items() if name != own}
        youngest_first = sorted(old, key=lambda name: age(old[name]))
        self._drains = [
            asyncio.ensure_future(
                self._drain(name, old[name], limit if place < MOST_DRAINED else _BRIEF)
            )
            for place, name in enumerate(youngest_first)
        ]

    def cancel(self) -> None:
        """Wait for them no more."""
        for each in self._drains:
            each.cancel()

    async def _drain(self, name: str, process: RunningProcess, limit: float) -> None:
        told = self._told.value.pids
        if process.pid not in told and not process.ended:
            told.append(process.pid)
            self._adapter.drain(process)
        async with draining(self._adapter, [process]):
            ended = await process.ends(limit)
        if not ended:
            _log.warning("%s has not ended within %.0f s after it was replaced", process, limit)
            await in_thread(functools.partial(self._adapter.end, [process], 0, told=True))
        # One that was killed has left its workers behind.
        await in_thread(end, session(leader(name)), HARD)
        self._paths.restore()
        told[:] = [pid for pid in told if pid != process.pid]
        self._host.notifications.forget(leader(name))
        await in_thread(self._host.instance.forget, name)


@contextlib.asynccontextmanager
async def draining(
    adapter: ProgramAdapter, processes: Sequence[RunningProcess]
) -> AsyncIterator[None]:
    """Have the adapter do what programs need that were told to drain, as long as somebody waits for them."""
    doing = [asyncio.ensure_future(_helped(adapter, each)) for each in processes]
    try:
        yield
    finally:
        for each in doing:
            each.cancel()


async def _helped(adapter: ProgramAdapter, process: RunningProcess) -> None:
    try:
        await adapter.while_draining(process)
    except Exception as error:
        _log.warning("%s is drained without its adapter: %s", process, error)
