# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has the tables of a source copied on an asyncio loop, between all that is served there."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socket import socket

    from upgrader.instance.copying import Copying


async def copy_tables(copying: Copying, channel: socket, stop: asyncio.Event) -> None:
    """Go on until the copying is over, or `stop`; `channel` is that of the destination."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    loop.add_reader(channel, news.set)
    try:
        while (wait := copying.step()) is not None and not stop.is_set():
            news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await news.wait()
    finally:
        loop.remove_reader(channel)
