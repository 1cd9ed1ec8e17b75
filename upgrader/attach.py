# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way in: `with attach(...)` for blocking programs, `async with attach(...)` for asyncio."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from upgrader.errors import DeclarationError, UpgradeError
from upgrader.protocol.collector import no_collection

if TYPE_CHECKING:  # each is loaded only by those who use it
    from upgrader.aio.instance import AsyncioInstance
    from upgrader.blocking.instance import Instance


class attach:  # noqa: N801, it reads as a function
    """Attach this process to systemd as an instance of `service`.

    `version` is the program's own, for people. Raises DeclarationError in a forked process, or for
    an UPGRADER_ variable that makes no sense.
    """

    def __init__(self, service: str, *, version: str = "") -> None:
        self._service = service
        self._version = version
        self._blocking: Instance | None = None
        self._aio: AsyncioInstance | None = None

    def __enter__(self) -> Instance:
        with no_collection():
            from upgrader.blocking.instance import Instance
            from upgrader.instance.process import in_loop

        with _explained(self._service):
            if in_loop():
                raise DeclarationError(
                    "with attach()", "is for programs without asyncio", remedy="write async with"
                )
            self._blocking = Instance(self._service, self._version, os.environ)
        return self._blocking

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._blocking is not None
        self._blocking.__exit__(kind, error, trace)

    async def __aenter__(self) -> AsyncioInstance:
        with no_collection():
            from upgrader.aio.instance import AsyncioInstance

        with _explained(self._service):
            self._aio = AsyncioInstance(self._service, self._version, os.environ)
        return await self._aio.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._aio is not None
        await self._aio.__aexit__(kind, error, trace)


@contextlib.contextmanager
def _explained(service: str) -> Iterator[None]:
    """Under systemd, an admin reads what is wrong: one line, also in the journal."""
    try:
        yield
    except UpgradeError as error:
        if "NOTIFY_SOCKET" not in os.environ:
            raise
        from upgrader.systemd import cgroup, journal

        message = f"{service}: {error}"
        journal.report(
            message, journal.Priority.ERR, unit=cgroup.own_unit(), generation=0, side="destination",
            phase="attach", outcome=journal.JournalOutcome.FAILED,
        )  # fmt: skip
        raise SystemExit(message) from error
