# SPDX-License-Identifier: LGPL-2.1-or-later
"""Once asked to, does what a service that is upgraded live should not do."""

import asyncio
import os
import signal
import socket
import time

import upgrader

PORT = int(os.environ["PORT"])


async def main() -> None:
    async with upgrader.attach("careless") as instance:
        door = instance.listener("door", bind=f"127.0.0.1:{PORT}")
        held = []

        @instance.connections(door)
        async def answer(peer: upgrader.Peer[None]) -> None:
            async for _ in peer.lines():
                import colorsys  # noqa: F401

                for family, kind, address in (
                    (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", PORT + 1000)),
                    (socket.AF_INET6, socket.SOCK_DGRAM, ("::1", PORT - 6500)),
                    (socket.AF_UNIX, socket.SOCK_STREAM, "/run/careless/other.sock"),
                ):
                    held.append(socket.socket(family, kind))
                    held[-1].bind(address)
                    if kind == socket.SOCK_STREAM:
                        held[-1].listen()
                if os.fork() == 0:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    time.sleep(3600)
                await peer.write(b"done\n")

        await instance.serve()


if __name__ == "__main__":
    asyncio.run(main())
