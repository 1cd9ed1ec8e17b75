# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same server on the library, with what it knows of a stream as the state of its connection."""

import asyncio
import os
import sys
import time

import upgrader

VERSION = "@VERSION@"


@upgrader.state("talk", version=1)
class Talk:
    """What it knows of one connection."""

    streaming: bool = False


def head(received: bytearray) -> int | None:
    """The length of the first request, None if it is not there yet."""
    end = received.find(b"\r\n\r\n")
    return end + 4 if end >= 0 else None


async def main() -> None:
    """Serve until stopped, or until another instance has taken over."""
    async with upgrader.attach("library", version=VERSION) as instance:
        http = instance.listener("http", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(http, state=Talk)
        async def talk(peer: upgrader.Peer[Talk]) -> None:
            line = VERSION.encode() + b"\n"
            if not peer.state.streaming:
                async for request in peer.messages(head):
                    if request.startswith(b"GET /stream"):
                        peer.state.streaming = True
                        await peer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                        break
                    await peer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(line), line)
                    )
                    if b"connection: close" in request.lower():
                        return
                else:
                    return
            while True:
                async with peer.safe():
                    await peer.write(b"%x\r\n%s\r\n" % (len(line), line))
                    await asyncio.sleep(0.05)

        await instance.serve()


if VERSION == "broken":
    sys.exit("this version cannot start")
if VERSION == "hanging":
    time.sleep(3600)
asyncio.run(main())
