# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop a loop from watching what belongs to another instance, however the program has it watched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Collection, Iterable
from typing import Any


def watch_no_more(
    loop: asyncio.AbstractEventLoop, numbers: Iterable[int], others: Collection[int]
) -> None:
    """Call no callback of the program for these FDs any more, nor for copies of sockets among them that
    a transport or a server of its own has: what those took would be lost. `others`: FDs that are known to
    be no such copies; there may be thousands."""
    numbers = set(numbers)
    selector = getattr(loop, "_selector", None)
    if selector is None:  # of another library: what a transport of it has, only that knows
        for number in numbers:
            with contextlib.suppress(RuntimeError):
                loop.remove_reader(number)
                loop.remove_writer(number)
        return
    asyncios: Any = loop  # its public calls refuse what a transport has
    sockets = {identity for number in numbers if (identity := _socket(number))}
    for number in set(selector.get_map()).difference(others):
        if number in numbers or _socket(number) in sockets:
            asyncios._remove_reader(number)
            asyncios._remove_writer(number)


def _socket(number: int) -> tuple[int, int] | None:
    """What tells a socket from any other one; None for what is none, or closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None
