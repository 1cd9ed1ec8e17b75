# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with a handler over TLS: `python tls_board.py PORT CERTIFICATE VERSION [AT]`. It answers each
line with its version, how many lines this connection has said, and the line. `AT` is where it ends itself:
`verify`, or `commit`; or a file for which it waits in its check, once it has made FILE.there."""

import asyncio
import os
import signal
import ssl
import sys
import time
from pathlib import Path

import upgrader
from upgrader.aio import Peer

PORT, CERTIFICATE, VERSION, *AT = sys.argv[1:]


@upgrader.state("session")
class Session:
    lines: int = 0


async def main() -> None:
    async with upgrader.attach("board") as instance:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        listener = instance.listener("board", bind=f"127.0.0.1:{PORT}")

        @instance.connections(listener, state=Session, tls=context)
        async def talk(peer: Peer[Session]) -> None:
            if not peer.adopted:
                await peer.write(f"welcome {peer.tls.version()}\n".encode())
            async for line in peer.lines():
                peer.state.lines += 1
                await peer.write(f"{VERSION} {peer.state.lines} ".encode() + line + b"\n")

        @instance.verify
        def check() -> None:
            if "verify" in AT:
                os.kill(os.getpid(), signal.SIGKILL)
            for path in AT:
                if path[0] == "/":
                    Path(f"{path}.there").touch()
                    while not os.path.exists(path):
                        time.sleep(0.01)

        async def end() -> None:
            if "commit" in AT:
                os.kill(os.getpid(), signal.SIGKILL)

        await instance.serve([end])


if os.environ.get("LOOP") == "uvloop":
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
