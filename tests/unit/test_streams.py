# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which connections of a StreamReader handler may move, and that those go on as if nothing was."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import upgrader
from tests.unit.hosting import Client, Side, turns
from upgrader.aio import start_server, streams
from upgrader.aio.hosted_end import Goodbyes, end_all
from upgrader.aio.streams import Connected, Reader, Streams

Story = Callable[[Side, Side, Client], Coroutine[Any, Any, None]]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


class Log(list[str]):
    """What handlers do: they begin and end, and take a line `slow` and wait until they may go on."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.go = asyncio.Event()


def lines(name: bytes, log: Log) -> Handler:
    """Answers lines; notes when a handler begins, and when it ends, for whatever reason."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log.append("begins")
        try:
            while line := await reader.readline():
                if line == b"slow\n":
                    log.taken.set()
                    await log.go.wait()
                writer.write(name + b" " + line)
        finally:
            log.append("ends")
            writer.close()

    return handle


def frames(name: bytes, log: Log) -> Handler:
    """A header in one call, a body in another: what `stateless` forbids."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                size = (await reader.readexactly(1))[0]
                writer.write(name + b" " + await reader.readexactly(size) + b"\n")
        writer.close()

    return handle


async def begin(connected: Connected, *, stateless: bool, stack: contextlib.ExitStack) -> Side:
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    sock.setblocking(False)
    return Side(Streams(connected, 65536, stateless=stateless), sock)


def play(
    story: Story,
    *,
    stateless: bool,
    handler: Callable[[bytes, Log], Handler] = lines,
    log: Log | None = None,
) -> None:
    async def scene() -> None:
        with contextlib.ExitStack() as stack:
            of_a = Log() if log is None else log
            a = await begin(handler(b"A", of_a), stateless=stateless, stack=stack)
            b = await begin(handler(b"B", Log()), stateless=stateless, stack=stack)
            a.hosting.open()
            reader, writer = await asyncio.open_connection(*a.listener.socket.getsockname())
            client = Client(reader, writer)
            await a.accepted(client)
            await story(a, b, client)
            writer.close()
            for side in (a, b):
                side.hosting.hold(for_good=True)
                await side.hosting.cut()

    asyncio.run(scene())


async def line(client: Client, data: bytes) -> bytes:
    client.send(data)
    async with asyncio.timeout(10):
        return await client.reader.readline()


def test_a_handler_at_its_first_message() -> None:
    """It moves with half a line, and is called anew; the one here neither goes on nor ends."""
    log = Log()

    async def story(a: Side, b: Side, client: Client) -> None:
        client.send(b"he")
        await a.has_read(client)
        frozen, left = await a.collect()
        assert [(b"he", [])] == [(item.state.session, left) for item in frozen]
        a.commit(frozen, b)
        assert b"B hello\n" == await line(client, b"llo\n")
        assert ["begins"] == log

    play(story, stateless=False, log=log)


@pytest.mark.parametrize(("stateless", "answer"), [(False, b"A two\n"), (True, b"B two\n")])
def test_a_handler_at_a_later_message(*, stateless: bool, answer: bytes) -> None:
    """Only if its author says that it keeps nothing from one to the next."""

    async def story(a: Side, b: Side, client: Client) -> None:
        assert b"A one\n" == await line(client, b"one\n")
        a.hosting.hold(for_good=False)
        before = time.monotonic()
        await a.hosting.settle(before + 10, drained=True)
        assert time.monotonic() < before + 5  # nobody waits for what never comes
        frozen, left = a.hosting.freeze()
        assert (int(stateless), int(not stateless)) == (len(frozen), len(left))
        a.commit(frozen, b)
        assert answer == await line(client, b"two\n")

    play(story, stateless=stateless)


def test_a_conversation_is_not_told_goodbye() -> None:
    """It has no word for that: it goes on until all of the time for draining has passed."""

    async def story(a: Side, b: Side, client: Client) -> None:
        assert b"A one\n" == await line(client, b"one\n")
        frozen, left = await a.collect()
        assert (0, 1) == (len(frozen), len(left))
        a.commit(frozen, b)
        now = time.monotonic()
        ending = asyncio.create_task(end_all([a.hosting], now + 0.2, None, Goodbyes(now, 0)))
        await turns()
        assert b"A two\n" == await line(client, b"two\n")
        await ending
        assert await client.at_end()

    play(story, stateless=False)


def test_what_comes_while_it_is_collected() -> None:
    """The rest of a line is not given to the handler here: it moves, after what is buffered."""

    async def story(a: Side, b: Side, client: Client) -> None:
        client.send(b"he")
        await a.has_read(client)
        a.hosting.hold(for_good=False)
        client.send(b"llo\n")
        await a.has_read(client)
        frozen, _ = a.hosting.freeze()
        (state,) = [item.state for item in frozen]
        assert (b"he", b"llo\n") == (state.session, state.unread)
        a.commit(frozen, b)
        assert b"B hello\n" == await line(client, b"")

    play(story, stateless=True)


def test_a_handler_at_work() -> None:
    """What it has taken is answered by it, and the connection ends once it asks for more."""

    log = Log()

    async def story(a: Side, b: Side, client: Client) -> None:
        client.send(b"slow\n")
        await log.taken.wait()
        frozen, left = await a.collect()
        assert ([], ["it is busy"]) == (frozen, [item.why for item in left])
        a.commit(frozen, b)
        log.go.set()
        assert b"A slow\n" == await line(client, b"")
        a.hosting.drain()
        assert await client.at_end()

    play(story, stateless=True, log=log)


def test_a_handler_that_has_been_woken() -> None:
    """A line that is there, and that its handler is about to take, is answered once: not moved
    and taken here as well."""

    async def story(a: Side, b: Side, client: Client) -> None:
        (hosted,) = a.hosting.connections
        reader: Any = hosted.protocol
        assert hosted.idle
        reader.data_received(b"now\n")
        assert not hosted.idle
        assert b"A now\n" == await line(client, b"")
        assert hosted.idle

    play(story, stateless=True)


def test_a_restart_ends_what_cannot_move() -> None:
    """The handler ends what it is at, and reads the end of the stream."""

    log = Log()

    async def story(a: Side, b: Side, client: Client) -> None:
        assert b"A one\n" == await line(client, b"one\n")
        client.send(b"slow\n")
        await log.taken.wait()
        a.hosting.hold(for_good=True)
        settling = asyncio.create_task(a.hosting.settle(time.monotonic() + 10, for_good=True))
        await turns()
        log.go.set()
        await settling
        assert b"A slow\n" == await line(client, b"")
        assert await client.at_end()
        frozen, (left,) = a.hosting.freeze()
        assert [] == frozen
        assert "stream" in left.what

    play(story, stateless=False, log=log)


def test_a_message_in_two_calls() -> None:
    """At its first one, a handler in the middle of such a message stays."""

    async def story(a: Side, b: Side, client: Client) -> None:
        client.send(b"\x05he")
        await a.has_read(client)
        frozen, left = await a.collect()
        assert ([], 1) == (frozen, len(left))
        a.commit(frozen, b)
        assert b"A hello\n" == await line(client, b"llo")

    play(story, stateless=False, handler=frames)


@pytest.mark.parametrize(
    ("read", "data", "waits"),
    [
        (lambda reader: reader.read(), b"some", False),
        (lambda reader: reader.read(10), b"", True),
        (lambda reader: reader.readexactly(10), b"some", True),
        (lambda reader: reader.readuntil(b";"), b"some", True),
        (lambda reader: reader.readline(), b"some", True),
    ],
)
def test_what_a_read_has_taken(
    read: Callable[[Reader], Coroutine[Any, Any, bytes]], data: bytes, *, waits: bool
) -> None:
    """Reading to the end takes what comes; all others leave it in the buffer until it is enough,
    which is where asyncio keeps it."""

    async def story() -> None:
        reader = Reader(65536, b"")
        task = asyncio.create_task(read(reader))
        await turns()
        assert reader.waiting
        if data:
            reader.feed_data(data)
        await turns()
        assert waits == reader.waiting
        assert (data if waits else b"") == bytes(streams._buffered(reader))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert not reader.waiting

    asyncio.run(story())


def test_outside_of_an_instance() -> None:
    """And with what only a new socket can have, the program is told what to do."""

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    async def story() -> None:
        with pytest.raises(upgrader.DeclarationError, match="needs an instance"):
            await start_server(nobody, "127.0.0.1", 7000)
        async with upgrader.attach("streams") as instance:
            with pytest.raises(upgrader.DeclarationError, match="reuse_port: the instance takes"):
                await start_server(nobody, "127.0.0.1", 7000, reuse_port=True)
            server = await start_server(nobody, "127.0.0.1", 7000, backlog=10)
            assert (False, ()) == (server.is_serving(), server.sockets)
            with pytest.raises(upgrader.DeclarationError, match="declared twice"):
                await start_server(nobody, "127.0.0.1", 7000)
            assert ["tcp-7000"] == list(instance._parts.declarations.protocols)

    asyncio.run(story())
