# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same server as an ASGI application (`asgi`) and as a WSGI one (`wsgi`)."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

VERSION = "@VERSION@"
LINE = VERSION.encode() + b"\n"

if VERSION == "broken":
    sys.exit("this version cannot start")
if VERSION == "hanging":
    time.sleep(3600)


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer with the version, or stream it."""
    if scope["type"] != "http":
        return
    streams = scope["path"] == "/stream"
    headers = [] if streams else [(b"content-length", b"%d" % len(LINE))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while streams:
        await send({"type": "http.response.body", "body": LINE, "more_body": True})
        await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": LINE})


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer with the version, or stream it."""
    if environ["PATH_INFO"] == "/stream":
        start_response("200 OK", [])
        return _stream()
    start_response("200 OK", [("Content-Length", str(len(LINE)))])
    return [LINE]


def _stream() -> Iterator[bytes]:
    while True:
        yield LINE
        time.sleep(0.05)
