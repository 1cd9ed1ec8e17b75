# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of a program on its way to the next one, which an adapter saves and loads.

It is a file in memory that PID 1 keeps, sealed once it is whole. One that is empty is spent: whoever serves
has gone on from it, or has not needed it. So each is decided by one system call, whoever dies in between.
"""

import asyncio
import fcntl
import os
from collections.abc import Coroutine, Sequence
from typing import Any

from upgrader.aio.instance import AsyncioInstance
from upgrader.aio.safe_points import SafePoints
from upgrader.errors import UpgradeError, VerifyError
from upgrader.protocol.fd import Fd
from upgrader.runner.adapter import ProgramAdapter
from upgrader.runner.host import PROGRAM, STATE, WHOLE, Host, in_thread
from upgrader.runner.processes import RunningProcess, age
from upgrader.runner.start import ProgramStart

#: Seconds in which a program that goes on has the CPU for itself: a machine has its pages and its code
#: prepared anew then, and all that follows the commit can wait.
_CALM = 0.04


class ProgramState:
    """That of one runner's program, as its source and as its destination."""

    def __init__(self, host: Host, adapter: ProgramAdapter, start: ProgramStart) -> None:
        self._start = start
        self.program: RunningProcess | None = None  #: the one of this runner, once it is ready
        self._host = host
        self._adapter = adapter
        self._at_rest = False  # `save` was begun, and not undone
        self._one_at_a_time = asyncio.Lock()
        self._saving: asyncio.Future[None] | None = None

    def declare(self, instance: AsyncioInstance) -> None:
        """Have it saved before a freeze, and loaded before a commit."""
        if self._adapter.stateful:
            instance.quiesce(self.quiesce)
            instance.resumed(self.go_on)
            instance.verify(self.load)

    @property
    def _safe_points(self) -> SafePoints:
        return self._host.instance._runtime.connections.safe_points

    # Of the program that serves

    async def quiesce(self) -> None:
        """Have it come to rest; once nothing may begin any more, save its state."""
        assert self.program
        async with self._one_at_a_time:
            if self.program.ended:
                return  # there is nothing to save
            if not self._host.instance._parts.source.held:
                await self._adapter.quiesce(self.program)
            elif self._host.leaves_program:
                return  # it serves on, and the next runner asks it
            else:
                self._at_rest = True
                self._saving = asyncio.ensure_future(self._save(self.program))
                await self._saving

    async def go_on(self) -> None:
        """Have it serve again, after that, whether it has come to an end or not."""
        assert self.program
        if self._saving:
            self._saving.cancel()
        async with self._one_at_a_time:
            if self._at_rest:
                self._at_rest = False
                await self._resume(self.program)

    async def _save(self, program: RunningProcess) -> None:
        name, flags = f"upgrader-{STATE}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        with Fd(os.memfd_create(name, flags)) as state:
            # PID 1 has it before the program stops: nobody waits for PID 1 then.
            await in_thread(self._host.instance.keep, STATE, state)
            await self._adapter.save(program, state)
            if not os.fstat(state.fileno()).st_size:
                raise VerifyError(f"{program} has saved nothing")
            fcntl.fcntl(state.fileno(), fcntl.F_ADD_SEALS, WHOLE)

    # Of the program that is to serve

    async def load(self) -> None:
        """Have the new program load what the old one has saved, which is asked for it first if its own
        runner has died; the old one serves on if that fails. Raises VerifyError."""
        host, program = self._host, self.program
        if not self._start.incoming:
            return
        assert program
        own = f"{PROGRAM}{program.pid}"
        source = None
        try:
            if not host.is_live:
                source = await self._left([p for n, p in host.programs().items() if n != own])
            if source and host.state is None:
                await self._in_time(self._save(source), f"{source} has not saved its state")
            if (state := host.state) is None:
                raise VerifyError("the program before has given no state")
            loading = host.lives(program, self._adapter.load(program, state))
            await self._in_time(loading, f"{program} has not loaded the state")
            self._safe_points.expect(self)  # what can wait, waits until it goes on
        except BaseException:
            await self._start.refuse(program)
            host.notifications.withdraw()  # none is started after it
            if source:
                await self._resume(source)
            raise

    async def _left(self, old: Sequence[RunningProcess]) -> RunningProcess | None:
        """The one that serves or has saved its state, of programs whose runners are gone: the youngest
        one that can come to rest. Raises what the oldest one says if none can."""
        living = sorted((each for each in old if not each.ended), key=age)
        for place, each in enumerate(living, 1):
            try:
                if self._host.state is None:
                    await self._adapter.quiesce(each)
            except UpgradeError:
                if place == len(living):
                    raise
            else:
                return each
        return None

    async def _in_time(self, work: Coroutine[Any, Any, None], failure: str) -> None:
        limit = self._host.instance._parts.report.parameters.downtime_limit
        try:
            async with asyncio.timeout(limit):
                await work
        except TimeoutError as error:
            raise VerifyError(f"{failure} within downtime-limit ({limit:g} s)") from error

    async def begin(self) -> None:
        """This runner is the owner: have its program serve."""
        if self._start.incoming:
            assert self.program
            await self._resume(self.program)

    async def _resume(self, program: RunningProcess) -> None:
        try:
            if (state := self._host.state) is not None:
                os.ftruncate(state.fileno(), 0)
            await self._adapter.resume(program)
            await asyncio.sleep(_CALM)
        finally:
            self._safe_points.arrive(self)
        await in_thread(self._host.instance.forget, STATE)
