# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ASGI application without a framework: answers with VERSION, and writes down its lifespan."""

import os
import sys
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            print(f"lifespan {event}", file=sys.stderr, flush=True)
            await send({"type": f"lifespan.{event}.complete"})
        return
    body = os.environ["VERSION"].encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
