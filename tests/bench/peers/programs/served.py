# SPDX-License-Identifier: LGPL-2.1-or-later
"""A web server of the standard library that takes its listener from whoever has it: systemd, its FD store,
Server::Starter, or nobody. At SIGTERM it accepts no more, and ends when its last answer has."""

import array
import asyncio
import os
import signal
import socket
import sys
import time

VERSION = "@VERSION@"
PORT = int(os.environ.get("PORT", "8080"))


def listener() -> socket.socket:
    """The listener that this process was given, or a new one."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) or "LISTEN_FDNAMES" in os.environ:
        return socket.socket(fileno=3)
    if given := os.environ.get("SERVER_STARTER_PORT"):
        return socket.socket(fileno=int(given.rpartition("=")[2]))
    return socket.create_server(("127.0.0.1", PORT), backlog=2048)


def notify(message: bytes, *fds: int) -> None:
    """Tell systemd."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            name = "\0" + place[1:] if place.startswith("@") else place
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sock.sendmsg([message], rights, 0, name)


class Server:
    """Counts what is under way, to know when all is answered."""

    def __init__(self) -> None:
        self.draining = False
        self.idle: set[asyncio.StreamWriter] = set()
        self.open = 0
        self.empty = asyncio.Event()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.open += 1
        try:
            while not self.draining:
                self.idle.add(writer)
                head = await reader.readuntil(b"\r\n\r\n")
                self.idle.discard(writer)
                if head.startswith(b"GET /stream"):
                    await self.stream(writer)
                    return
                closes = self.draining or b"connection: close" in head.lower()
                body = VERSION.encode() + b"\n"
                connection = b"Connection: close\r\n" if closes else b""
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s"
                    % (len(body), connection, body)
                )
                await writer.drain()
                if closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.idle.discard(writer)
            writer.close()
            self.open -= 1
            if not self.open:
                self.empty.set()

    async def stream(self, writer: asyncio.StreamWriter) -> None:
        """Chunks, until the client goes."""
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            line = VERSION.encode() + b"\n"
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
            await asyncio.sleep(0.05)

    async def drain(self) -> None:
        """Close who waits for nothing, and wait for the others."""
        self.draining = True
        for writer in list(self.idle):
            writer.close()
        while self.open:
            self.empty.clear()
            await self.empty.wait()


async def main() -> None:
    """Serve until SIGTERM."""
    sock = listener()
    loop, stop, server = asyncio.get_running_loop(), asyncio.Event(), Server()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    listening = await asyncio.start_server(server.talk, sock=sock)
    if "--store" in sys.argv:
        notify(b"FDSTORE=1\nFDNAME=http", sock.fileno())
    notify(b"READY=1")
    await stop.wait()
    listening.close()
    await server.drain()


if VERSION == "broken":
    sys.exit("this version cannot start")
if VERSION == "hanging":
    time.sleep(3600)
asyncio.run(main())
