# SPDX-License-Identifier: LGPL-2.1-or-later
"""An adapter whose runner waits at the step that the file `step` in its directory names, until the file `go`
is there; it says by `mark` that it waits, and by `on` that it goes on."""

import asyncio
import contextlib
import importlib
import time
from collections.abc import AsyncIterator
from typing import Any

from upgrader.programs import RunningProcess, StartOrder, StartRequest
from upgrader.protocol.programs import known


def adapter(host: Any) -> Any:
    """As the adapter of the program, but for that."""
    name = known(host.options.program[0]).adapter
    module = f"upgrader.programs.{name}" if name else "upgrader.runner.adapter"
    found = importlib.import_module(module)
    base: Any = found.ADAPTER if name else found.ProgramAdapter

    class Stops(base):  # type: ignore[misc]
        def _is_at(self, step: str) -> bool:
            file = self.host.directory / "step"
            if not (file.exists() and file.read_text() == step):
                return False
            (self.host.directory / "mark").touch()
            return True

        def _goes(self) -> bool:
            if not (self.host.directory / "go").exists():
                return False
            (self.host.directory / "on").touch()
            return True

        async def _at(self, step: str) -> None:
            if self._is_at(step):
                while not self._goes():
                    await asyncio.sleep(0.01)

        async def _loaded(self) -> None:
            await self._at("loaded")

        @contextlib.asynccontextmanager
        async def starting(self, start: StartRequest) -> AsyncIterator[StartOrder]:
            self.host.instance.verify(self._loaded)
            await self._at("prepare")
            async with super().starting(start) as order:
                yield order

        async def ready(self, program: RunningProcess, start: StartRequest) -> None:
            await self._at("started")
            await super().ready(program, start)
            await self._at("ready")

        async def check(self, program: RunningProcess, start: StartRequest) -> None:
            await super().check(program, start)
            await self._at("checked")

        def drain(self, program: RunningProcess) -> None:
            if self._is_at("committed"):
                while not self._goes():
                    time.sleep(0.01)
            super().drain(program)

    return Stops(host)


ADAPTER = adapter
