# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting on an asyncio loop: for one of several things, and for what must end by a deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_GRACE = 1.0  # seconds for what has to end although the deadline has passed
_log = logging.getLogger("upgrader")


async def next_event(
    stop: asyncio.Event, requests: asyncio.Queue[T], tasks: list[asyncio.Task[object]]
) -> T | BaseException | None:
    """Wait for a migration that is wanted, for what a task raised, or to be told to stop (None)."""
    stopped = asyncio.ensure_future(stop.wait())
    wanted = asyncio.ensure_future(requests.get())
    pending: set[asyncio.Task[Any]] = {stopped, wanted, *(t for t in tasks if not t.done())}
    try:
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if stopped in done:
                return None
            for task in done - {wanted}:
                if not task.cancelled() and (error := task.exception()):
                    _log.error("task %s failed", task.get_name(), exc_info=error)
                    return error
            if wanted in done:
                return wanted.result()
    finally:
        stopped.cancel()
        wanted.cancel()


async def first(timeout: float | None, *events: asyncio.Event) -> None:
    """Wait for one of several events, or for the time-out, if there is one."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def until_deadline(deadline: float) -> asyncio.Timeout:
    """A timeout at a deadline of `time.monotonic`, but in a second at the earliest."""
    return asyncio.timeout(max(deadline - time.monotonic(), _GRACE))


async def cancel(tasks: Sequence[asyncio.Task[Any]], deadline: float) -> None:
    """Cancel tasks and wait for their end; one that lives beyond the deadline is named."""
    for task in tasks:
        task.cancel()
    if tasks:
        timeout = max(deadline - time.monotonic(), _GRACE)
        _, pending = await asyncio.wait(tasks, timeout=timeout)
        for task in pending:
            _log.error("task %s did not end when cancelled", task.get_name())
