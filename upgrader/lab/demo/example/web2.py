# SPDX-License-Identifier: LGPL-2.1-or-later
"""An example web service, version 2: as version 1, and it counts the lines that it streamed."""

import asyncio
import os
from http import HTTPStatus

import upgrader

from .http11 import chunk, head, requests, response
from .session import Session

BIND = os.environ.get("WEB_BIND", "127.0.0.1:8080")


@upgrader.state("counters", version=2, readable_from=1)
class Totals:
    """What the service knows: the `Counters` of version 1, which can still read it, without the new field."""

    requests: int = 0
    streamed: int = upgrader.since(2, default=0)


async def main() -> None:
    """Serve until stopped, or until another instance has taken over."""
    async with upgrader.attach("web", version="2") as instance:
        instance.state(Totals)
        listener = instance.listener("http", bind=BIND)

        @instance.connections(listener, state=Session)
        async def talk(peer: upgrader.Peer[Session], counters: Totals) -> None:
            if peer.state.streaming:  # adopted in the middle of a stream: the state says where
                await stream(peer, counters)
            async for request in requests(peer):
                counters.requests += 1
                peer.state.requests += 1
                about = {
                    "Service-Version": instance.version,
                    "Service-Generation": instance.generation,
                    "Service-Requests": counters.requests,
                    "Service-Streamed": counters.streamed,
                    "Connection-Requests": peer.state.requests,
                }
                if request.path == "/stream":
                    peer.state.streaming = True
                    await peer.write(head(HTTPStatus.OK, about | {"Transfer-Encoding": "chunked"}))
                    await stream(peer, counters)
                text = f"{request.method} {request.path} by generation {instance.generation}\n"
                await peer.write(response(HTTPStatus.OK, about, text))
                if request.close:
                    return

        async def stream(peer: upgrader.Peer[Session], counters: Totals) -> None:
            while True:
                line = peer.state.advance(instance.generation)
                counters.streamed += 1
                async with peer.safe():  # what is written here is in the state
                    await peer.write(chunk(line))
                    await asyncio.sleep(0.05)

        await instance.serve()


if __name__ == "__main__":
    asyncio.run(main())
