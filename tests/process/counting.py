# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program with a state that it hands on: it answers each client with the next number, and knows nothing
of upgrader. The shared file LOG gets a line for each number, with the PID.

At the UNIX socket CONTROL it takes: `stop` (serve nobody any more), `count`, `load N`, `go` (serve).
With INCOMING=1 it waits for `go`. FLAW: load (refuses to), die, hang, slow (at `load`), save (never
answers `count`).
"""

import asyncio
import contextlib
import os
import signal
import socket

FLAW = os.environ.get("FLAW", "")
LOG = int(os.environ["LOG"])


async def main() -> None:
    count = 0
    listener = socket.socket(fileno=3)
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)

    def serve() -> None:
        nonlocal count
        with contextlib.suppress(BlockingIOError):
            client, _ = listener.accept()
            with client:
                count += 1
                os.write(LOG, b"%d %d\n" % (count, os.getpid()))
                client.sendall(b"%d %d\n" % (count, os.getpid()))

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while words := (await reader.readline()).split():
            answer = b"done"
            match words:
                case [b"stop"]:
                    loop.remove_reader(listener)
                case [b"count"]:
                    if FLAW == "save":
                        await asyncio.sleep(3600)
                    answer = b"%d" % count
                case [b"load", number]:
                    match FLAW:
                        case "load":
                            answer = b"no"
                        case "die":
                            os._exit(3)
                        case "slow":
                            await asyncio.sleep(1)
                        case "hang":
                            await asyncio.sleep(3600)
                    count = int(number)
                case [b"go"]:
                    loop.add_reader(listener, serve)
            writer.write(answer + b"\n")
            await writer.drain()
        writer.close()

    path = f"{os.environ['CONTROL']}/{os.getpid()}"
    await asyncio.start_unix_server(control, path)
    if os.environ.get("INCOMING") != "1":
        loop.add_reader(listener, serve)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
        sock.sendall(b"READY=1")
    await over.wait()
    os.unlink(path)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
