# SPDX-License-Identifier: LGPL-2.1-or-later
"""The adapter of counting.py: a program with a state, and a file that all its processes share."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping

from upgrader.errors import VerifyError
from upgrader.programs import ProgramAdapter, RunningProcess, StartOrder, StartRequest
from upgrader.protocol.fd import Fd


class Counting(ProgramAdapter):
    """Talks to its program at a socket beside the runner's."""

    stateful = True

    def shared(self, known: Mapping[str, Fd]) -> Mapping[str, Fd]:
        return known if "log" in known else {**known, "log": Fd(os.memfd_create("log"))}

    @contextlib.asynccontextmanager
    async def starting(self, start: StartRequest) -> AsyncIterator[StartOrder]:
        async with super().starting(start) as order:
            number = 3 + len(order.fds)
            told = {
                "CONTROL": str(self.host.directory),
                "INCOMING": str(int(start.incoming)),
                "LOG": str(number),
            }
            fds = (*order.fds, start.shared["log"])
            yield dataclasses.replace(order, environment={**order.environment, **told}, fds=fds)

    async def save(self, program: RunningProcess, state: Fd) -> None:
        await self._ask(program, "stop")
        os.write(state.fileno(), (await self._ask(program, "count")).encode())

    async def load(self, program: RunningProcess, state: Fd) -> None:
        count = os.pread(state.fileno(), 100, 0).decode()
        if await self._ask(program, f"load {count}") != "done":
            raise VerifyError(f"{program} has not loaded {count}")

    async def resume(self, program: RunningProcess) -> None:
        await self._ask(program, "go")

    async def _ask(self, program: RunningProcess, text: str) -> str:
        reader, writer = await asyncio.open_unix_connection(self.host.directory / str(program.pid))
        try:
            writer.write(f"{text}\n".encode())
            if not (line := await reader.readline()):
                await asyncio.Event().wait()  # it ends, of which the runner hears
            return line.decode().strip()
        finally:
            writer.close()


ADAPTER = Counting
