# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ASGI application without a framework: answers with VERSION, and writes down its lifespan. /events
never ends, /later has a task that ends a second after its answer, and /big and
/wide are answers of 64 MiB and 1 MiB."""

import asyncio
import os
import sys
from typing import Any


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


async def replaced() -> None:
    tell("replaced")


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        scope["state"]["upgrader.quiesce"] = lambda: tell("quiesced")
        scope["state"]["upgrader.replaced"] = replaced
        for event in ("startup", "shutdown"):
            await receive()
            tell(f"lifespan {event}")
            await send({"type": f"lifespan.{event}.complete"})
        return
    if scope["path"] == "/events":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
            await asyncio.sleep(0.05)
    sizes = {"/big": 1 << 26, "/wide": 1 << 20}
    body = bytes(sizes.get(scope["path"], 0)) or os.environ["VERSION"].encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    if scope["path"] == "/later":
        await asyncio.sleep(1)
        tell("later is done")
