# SPDX-License-Identifier: LGPL-2.1-or-later
"""Speaks to NOTIFY_SOCKET itself, as programs do that know nothing of upgrader.

At its start it says READY=1, and at its end STOPPING=1 and STATUS=gone. `say X` says X and answers, `child
X` has a child say it, `store NAME` stores a file. With FLAW=late it fails after it has said READY=1.
"""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import upgrader

CHILD = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.sendto(sys.argv[1].encode(), os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1))
"""


def say(text: str, *fds: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        socket.send_fds(sock, [text.encode()], list(fds))


async def main() -> None:
    async with upgrader.attach("speaking") as instance:
        say("READY=1\nSTATUS=starting")
        if os.environ.get("FLAW") == "late":
            sys.exit("fails after it has said that it is ready")
        bind = os.environ.get("BIND") or f"127.0.0.1:{os.environ['PORT']}"

        @instance.connections(instance.listener("lines", bind=bind))
        async def answer(peer: upgrader.Peer[None]) -> None:
            async for line in peer.lines():
                match line.decode().split(" ", 1):
                    case ["say", text]:
                        say(text)
                    case ["child", text]:
                        command = [sys.executable, "-c", CHILD, text]
                        await asyncio.to_thread(subprocess.run, command, check=True)
                    case ["store", name]:
                        memfd = os.memfd_create(name)
                        say(f"FDSTORE=1\nFDNAME={name}", memfd)
                        os.close(memfd)
                await peer.write(b"%d\n" % instance.generation)

        try:
            await instance.serve()
        finally:
            say("STOPPING=1\nSTATUS=gone")
            Path(os.environ["RUNTIME_DIRECTORY"], "gone").touch()


asyncio.run(main())
