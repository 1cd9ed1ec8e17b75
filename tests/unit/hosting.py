# SPDX-License-Identifier: LGPL-2.1-or-later
"""One side of a migration of connections that libraries own, in this process, and clients of it."""

import asyncio
import fcntl
import os
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable

from upgrader.aio import Adapter
from upgrader.aio.hosted_connection import HostedConnection
from upgrader.aio.hosted_listener import HostedListener
from upgrader.instance.commit import Adopted
from upgrader.instance.declarations import Bound, Protocols
from upgrader.instance.save import Frozen
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Kind

SECONDS = 10.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Side:
    """One instance's part: a library behind a listener."""

    def __init__(
        self, adapter: Adapter, sock: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        self.listener = Bound(Kind.LISTENER, "http")
        self.listener.open(sock)
        self.hosting = HostedListener(
            asyncio.get_running_loop(), Protocols(self.listener, adapter, tls)
        )

    async def collect(self) -> tuple[list[Frozen], list[LeftBehind]]:
        """What a migration does until the image is built."""
        self.hosting.hold(for_good=False)
        await self.hosting.settle(time.monotonic() + 0.5, drained=True)
        return self.hosting.freeze()

    async def drained(self) -> None:
        """What an instance does until nothing is left."""
        await until(lambda: not self.hosting.drain())

    async def accepted(self, client: "Client") -> HostedConnection:
        """The connection of a client, once there is one."""
        name = client.writer.get_extra_info("sockname")
        found: list[HostedConnection] = []

        def there() -> bool:
            peers = {
                each.transport.get_extra_info("peername"): each for each in self.hosting.connections
            }
            found.extend(each for peer, each in peers.items() if peer == name)
            return bool(found)

        await until(there)
        return found[0]

    async def has_read(self, client: "Client") -> None:
        """Wait until all that a client has sent is out of the kernel, and with the library."""
        there = await self.accepted(client)
        sock = client.writer.get_extra_info("socket")
        await until(
            lambda: not (_pending(sock, termios.TIOCOUTQ) or _pending(there.sock, termios.FIONREAD))
        )

    def commit(self, frozen: list[Frozen], to: "Side") -> None:
        """The same process on both sides: the destination has FDs of its own."""
        moved = [
            Adopted("http", duplicate(item.sock), item.identity, item.state, None)
            for item in frozen
        ]
        to.hosting.prepare(moved)
        self.hosting.let_go()
        self.hosting.close_copies()
        self.hosting.finish()
        to.hosting.open()


def _pending(sock: HasFileno, which: int) -> int:
    """Bytes that the kernel still has: sent and not acknowledged, or received and not read."""
    (number,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), which, bytes(4)))
    return int(number)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """Let everything go on that is about to."""
    for _ in range(count):
        await asyncio.sleep(0)


def duplicate(sock: HasFileno) -> Fd:
    return Fd(os.dup(sock.fileno()))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self) -> tuple[bytes, bytes]:
        """Head, in lower case, and body of the next answer."""
        async with asyncio.timeout(SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return head, await self.reader.readexactly(int(length or 0))

    async def ask(self, data: bytes = GET) -> str:
        self.send(data)
        return (await self.receive())[1].decode()

    async def at_end(self) -> bool:
        async with asyncio.timeout(SECONDS):
            return await self.reader.read() == b""
