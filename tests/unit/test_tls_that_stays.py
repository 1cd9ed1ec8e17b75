# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS connections of libraries whose keys cannot move: each ends in the source, after what it is at."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.unit.hosting import (
    GET,
    LARGE,
    SECONDS,
    Application,
    Client,
    Side,
    adapter_of,
    turns,
    until,
)
from tests.unit.tls_pairs import CERTIFICATE


@contextlib.asynccontextmanager
async def over_tls(application: Application) -> AsyncIterator[tuple[Side, Callable[[], Any]]]:
    """An instance that speaks TLS, and a function that connects to it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(CERTIFICATE)
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.check_hostname = False
    async with contextlib.AsyncExitStack() as stack:
        adapter = await stack.enter_async_context(adapter_of("h11", application))
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sock.setblocking(False)
        side = Side(adapter, sock, server)
        side.hosting.open()

        async def connect() -> Client:
            address = sock.getsockname()
            opened = await asyncio.open_connection(*address, ssl=context, limit=2 * LARGE)
            stack.callback(opened[1].close)
            return Client(*opened)

        yield side, connect
        side.hosting.hold(for_good=True)
        await side.hosting.cut()


def test_tls(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """The listener moves; open connections cannot, and end in the source after what they are at."""

    async def story() -> None:
        application = Application("A")
        async with over_tls(application) as (side, connect):
            clients = [await connect() for _ in range(2)]
            assert ["A", "A"] == [await client.ask() for client in clients]
            clients[1].send(GET.replace(b"/ ", b"/slow "))
            await application.asked.wait()

            frozen, left = await side.collect()

            assert [] == frozen
            assert ["the keys of TLS cannot move"] * 2 == [item.why for item in left]
            side.hosting.resume()
            assert "A" == await clients[0].ask()
            side.hosting.hold(for_good=True)
            deadline = time.monotonic() + SECONDS
            settling = asyncio.create_task(side.hosting.settle(deadline, for_good=True))
            assert await clients[0].at_end()
            application.go.set()
            head, body = await clients[1].receive()
            assert b"A" == body
            assert b"connection: close" in head
            assert await clients[1].at_end()
            await settling
            assert 2 == len(side.hosting.freeze()[1])

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(story())


def test_a_tls_handshake_under_way(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Who was about to connect in the instant of a commit is waited for, and has an answer."""

    async def story() -> None:
        async with over_tls(Application("A")) as (side, _):
            reader, writer = await asyncio.open_connection(*side.listener.socket.getsockname())
            await until(lambda: side.hosting.freeze() != ([], []))
            frozen, left = await side.collect()
            assert ([], 1) == (frozen, len(left))
            side.hosting.let_go()
            side.hosting.close_copies()
            side.hosting.finish(replaced=True)
            assert 1 == len(side.hosting.drain())
            await writer.start_tls(
                ssl.create_default_context(cafile=CERTIFICATE), server_hostname="localhost"
            )
            client = Client(reader, writer)
            client.send(GET)
            head, body = await client.receive()
            assert b"A" == body
            assert b"connection: close" in head
            assert await client.at_end()
            await side.drained()
            writer.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(story())


def test_a_slow_reader_of_tls(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """What lies below TLS and is not sent holds the drain, although nobody sees it there."""

    async def story() -> None:
        application = Application("A")
        async with over_tls(application) as (side, connect):
            client = await connect()
            transport = client.writer.transport
            transport.pause_reading()
            client.send(GET.replace(b"/ ", b"/large "))
            await application.answered.wait()
            side.hosting.hold(for_good=False)
            side.hosting.finish()
            for _ in range(5):
                await turns()
                assert 1 == len(side.hosting.drain())
            transport.resume_reading()
            assert LARGE == len((await client.receive())[1])
            await side.drained()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(story())
