# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that unmodified libraries own: held, frozen, resumed, moved, and those that cannot."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

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
from upgrader.aio.hosted_end import Goodbyes, end_all
from upgrader.protocol.image import LeftBehind


class Scene:
    """Two instances of a service, A and B, and clients of A."""

    def __init__(self, stack: contextlib.AsyncExitStack, a: Side, b: Side, first: Application):
        self._stack = stack
        self.a = a
        self.b = b
        self.first = first

    async def connect(self, side: Side | None = None) -> Client:
        address = (side or self.a).listener.socket.getsockname()
        reader, writer = await asyncio.open_connection(*address, limit=2 * LARGE)
        self._stack.callback(writer.close)
        return Client(reader, writer)

    async def migrate(self) -> list[LeftBehind]:
        frozen, left = await self.a.collect()
        self.a.commit(frozen, self.b)
        return left


Play = Callable[[Scene], Coroutine[Any, Any, None]]


@pytest.fixture(params=["h11", "httptools", "aiohttp"])
def play(
    request: pytest.FixtureRequest, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> Callable[[Play], None]:
    """Plays a scene with each library on each loop."""

    async def scene(what: Play, keep_alive: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            sides = []
            first = Application("A")
            for application in (first, Application("B")):
                adapter = await stack.enter_async_context(
                    adapter_of(request.param, application, keep_alive)
                )
                sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                sock.setblocking(False)
                sides.append(Side(adapter, sock))
            a, b = sides
            a.hosting.open()
            await what(Scene(stack, a, b, first))
            first.go.set()
            for side in sides:
                side.hosting.hold(for_good=True)
                side.hosting.finish()
                await side.hosting.cut()

    def run(what: Play, keep_alive: float = 10 * SECONDS) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(scene(what, keep_alive))

    return run


def test_a_resumed_connection(play: Callable[[Play], None]) -> None:
    """Frozen and resumed, again and again: nothing has happened, whatever came meanwhile."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        for _ in range(3):
            frozen, left = await scene.a.collect()
            assert (1, []) == (len(frozen), left)
            client.send(GET)
            await scene.a.has_read(client)
            scene.a.hosting.resume()
            assert b"A" == (await client.receive())[1]
            assert "A" == await client.ask()

    play(story)


def test_a_moved_connection(play: Callable[[Play], None]) -> None:
    """An idle one goes on at once under the other instance; its library here is not told."""

    async def story(scene: Scene) -> None:
        clients = [await scene.connect() for _ in range(3)]
        assert ["A"] * 3 == [await client.ask() for client in clients]
        new = await scene.connect()

        assert [] == await scene.migrate()

        for client in (*clients, new):
            assert "B" == await client.ask()
            assert "B" == await client.ask()

    play(story)


def test_a_request_that_comes_meanwhile(play: Callable[[Play], None]) -> None:
    """Taken from the socket while the instance came to a stop, it is answered by the other one,
    and before what comes after it."""

    async def story(scene: Scene) -> None:
        client, slow = await scene.connect(), await scene.connect()
        assert ["A", "A"] == [await client.ask(), await slow.ask()]
        slow.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()
        scene.a.hosting.hold(for_good=False)
        client.send(GET)
        await scene.a.has_read(client)
        await scene.a.hosting.settle(time.monotonic() + 0.05, drained=True)
        frozen, left = scene.a.hosting.freeze()
        assert [GET] == [item.state.unread for item in frozen]
        assert 1 == len(left)
        client.send(GET)

        scene.a.commit(frozen, scene.b)

        assert [b"B", b"B"] == [(await client.receive())[1] for _ in range(2)]

    play(story)


@pytest.mark.parametrize("moves", [True, False], ids=["moved", "resumed"])
def test_p3_keep_alive_does_not_run_while_held(
    play: Callable[[Play, float], None], *, moves: bool
) -> None:
    """One that became idle before it was held, and one that did so meanwhile: what their clients
    send long after keep-alive is answered, and then their time is as it always was."""

    async def story(scene: Scene) -> None:
        scene.b.hosting.open()
        before, meanwhile = await scene.connect(), await scene.connect()
        assert "A" == await before.ask()
        meanwhile.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()
        scene.a.hosting.hold(for_good=False)
        scene.first.go.set()
        assert b"A" == (await meanwhile.receive())[1]
        for _ in range(2):  # each of them as long as keep-alive
            beside = await scene.connect(scene.b)
            assert "B" == await beside.ask()
            assert await beside.at_end()
        before.send(GET)
        await scene.a.has_read(before)
        frozen, left = scene.a.hosting.freeze()
        assert (2, []) == (len(frozen), left)
        if moves:
            scene.a.commit(frozen, scene.b)
        else:
            scene.a.hosting.resume()

        meanwhile.send(GET)

        answer = b"B" if moves else b"A"
        assert [answer] * 2 == [(await each.receive())[1] for each in (before, meanwhile)]
        assert [True, True] == [await before.at_end(), await meanwhile.at_end()]

    play(story, 0.2)


def test_p3_a_request_that_was_sent_is_not_dropped_by_a_close(
    play: Callable[[Play, float], None],
) -> None:
    """An idle connection that is to end, whose client has asked already: it is answered first."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        there = await scene.a.accepted(client)
        os.write(client.writer.get_extra_info("socket").fileno(), GET)  # before the loop reads
        assert there.idle

        there.end()

        head, body = await client.receive()
        assert b"A" == body
        assert b"connection: close" in head
        assert await client.at_end()

    play(story)


def test_requests_with_bodies(play: Callable[[Play], None]) -> None:
    """After a body of known length or in chunks, in one piece or in many, a connection is idle."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"

    async def story(scene: Scene) -> None:
        known, chunked, split = [await scene.connect() for _ in range(3)]
        assert "A" == await known.ask(head + b"Content-Length: 5\r\n\r\nhello")
        assert "A" == await known.ask(head + b"Content-Length: 3\r\n\r\nyou")
        body = b"5\r\nhello\r\n0\r\n\r\n"
        assert "A" == await chunked.ask(head + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        for byte in head + b"Content-Length: 5\r\n\r\nhell":
            split.send(bytes([byte]))
            await scene.a.has_read(split)
        assert "A" == await split.ask(b"o")

        assert [] == await scene.migrate()

        assert ["B"] * 3 == [await client.ask() for client in (known, chunked, split)]

    play(story)


@pytest.mark.parametrize(
    "before", [b"", GET, GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\nhi")]
)
def test_half_a_request(play: Callable[[Play], None], before: bytes) -> None:
    """It is in the library's parser, which nobody can look into: answered here, then the end."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        client.send(before + GET[:-4])
        if before:
            assert b"A" == (await client.receive())[1]
        await scene.a.has_read(client)

        left = await scene.migrate()

        assert ["it is busy"] == [item.why for item in left]
        await turns()
        assert 1 == len(scene.a.hosting.drain())
        client.send(GET[-4:])
        assert b"A" == (await client.receive())[1]
        await scene.a.drained()
        assert await client.at_end()

    play(story)


def test_a_request_in_flight(play: Callable[[Play], None]) -> None:
    """It is named, answered by the source, and the answer says that it was the last one."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        client.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()

        (left,) = await scene.migrate()

        assert ("http", "it is busy") == (left.backend, left.why)
        assert "GET /slow" in left.what
        assert left.what in scene.a.hosting.drain()
        scene.first.go.set()
        head, body = await client.receive()
        assert b"A" == body
        assert b"connection: close" in head
        assert await client.at_end()
        assert [] == scene.a.hosting.drain()

    play(story)


def test_one_more_answer(play: Callable[[Play], None]) -> None:
    """An idle connection that cannot move is not closed under a client that is about to ask: the
    next answer says that it was the last one."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        scene.a.hosting.hold(for_good=False, crosses=False)
        scene.a.hosting.freeze()
        scene.a.hosting.let_go()
        scene.a.hosting.close_copies()
        scene.a.hosting.finish(replaced=True)
        for _ in range(3):
            await turns()
            assert 1 == len(scene.a.hosting.drain())
        client.send(GET)
        head, body = await client.receive()
        assert b"A" == body
        assert 1 == head.count(b"connection: close")
        assert await client.at_end()
        assert [] == scene.a.hosting.drain()

    play(story)


def test_an_answer_that_has_begun_is_not_the_last(
    play: Callable[[Play], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head cannot say that the connection ends, so the client asks again: that answer is the last.
    Who asks nothing more for a while is closed."""

    async def story(scene: Scene) -> None:
        client, silent = await scene.connect(), await scene.connect()
        for each in (client, silent):
            each.send(GET.replace(b"/ ", b"/begun "))
            head = await each.reader.readuntil(b"\r\n\r\nA")
            assert b"connection: close" not in head.lower()
        frozen, left = await scene.a.collect()
        assert (0, 2) == (len(frozen), len(left))
        scene.a.hosting.let_go()
        scene.a.hosting.finish(replaced=True)
        scene.first.go.set()
        for each in (client, silent):
            assert b"Z" == await each.reader.readexactly(1)
        scene.a.hosting.drain()
        await turns()
        assert 2 == len(scene.a.hosting.drain())
        client.send(GET)
        head, body = await client.receive()
        assert b"A" == body
        assert b"connection: close" in head
        assert await client.at_end()
        assert 1 == len(scene.a.hosting.drain())
        monkeypatch.setattr("upgrader.aio.hosted_listener._LAST_REQUEST", 0.0)
        await scene.a.drained()
        assert await silent.at_end()

    play(story)


def test_nobody_waits_for_a_long_request(play: Callable[[Play], None]) -> None:
    """Its answer can say that it was the last one, so the others go on at once."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        client.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()
        scene.a.hosting.hold(for_good=False)
        before = time.monotonic()
        await scene.a.hosting.settle(before + SECONDS, drained=True)
        assert time.monotonic() < before + SECONDS / 2

    play(story)


def test_an_answer_that_is_not_sent(play: Callable[[Play], None]) -> None:
    """A client that reads slowly gets all of it from the source."""

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        transport: Any = client.writer.transport
        transport.pause_reading()
        client.send(GET.replace(b"/ ", b"/large "))
        there = await scene.a.accepted(client)
        await until(lambda: there.transport.get_write_buffer_size() > 0)

        left = await scene.migrate()

        assert 1 == len(left)
        scene.a.hosting.drain()
        transport.resume_reading()
        assert LARGE == len((await client.receive())[1])
        await scene.a.drained()
        assert await client.at_end()

    play(story)


def test_a_websocket(play: Callable[[Play], None]) -> None:
    """Nobody waits for it to be idle; it is named, goes on in the source, and ends when cut."""
    upgrade = (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )

    async def story(scene: Scene) -> None:
        client = await scene.connect()
        client.send(upgrade)
        assert b" 101 " in (await client.receive())[0]
        scene.a.hosting.hold(for_good=False)
        before = time.monotonic()
        await scene.a.hosting.settle(before + SECONDS, drained=True)
        assert time.monotonic() < before + SECONDS / 2
        frozen, (left,) = scene.a.hosting.freeze()
        assert "/ws" in left.what

        scene.a.commit(frozen, scene.b)

        assert 1 == len(scene.a.hosting.drain())
        assert [left.what] == await scene.a.hosting.cut()
        with contextlib.suppress(ConnectionResetError):
            await client.reader.read()

    play(story)


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
CLOSE_1012 = b"\x88\x02" + (1012).to_bytes(2, "big")


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["at once", "spread"])
def test_p12_websockets_are_closed_one_after_the_other(
    play: Callable[[Play], None], *, spread: float
) -> None:
    """With 1012, over a time that can be set; who goes by itself is not waited for. A download
    goes on."""

    async def story(scene: Scene) -> None:
        clients = [await scene.connect() for _ in range(10)]
        for client in clients:
            client.send(UPGRADE)
            assert b" 101 " in (await client.receive())[0]
        slow = await scene.connect()
        slow.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()
        frozen, left = await scene.a.collect()
        assert (0, 11) == (len(frozen), len(left))
        scene.a.commit(frozen, scene.b)
        began = time.monotonic()
        goodbyes = Goodbyes(began + 0.1, spread)
        ending = asyncio.create_task(end_all([scene.a.hosting], began + SECONDS, None, goodbyes))

        ended = []
        for client in clients:
            assert CLOSE_1012 == (await client.reader.readexactly(4))
            ended.append(time.monotonic() - began)
            client.writer.close()

        assert ended[0] >= 0.1
        assert ended[-1] - ended[0] >= spread / 2
        assert not ending.done()
        scene.first.go.set()
        assert b"A" == (await slow.receive())[1]
        await ending

    play(story)


def test_a_client_that_goes_away(
    play: Callable[[Play], None], caplog: pytest.LogCaptureFixture
) -> None:
    """While its connection is held: nothing is left of it, and nobody is asked about it."""

    async def story(scene: Scene) -> None:
        client, other = await scene.connect(), await scene.connect()
        assert ["A", "A"] == [await client.ask(), await other.ask()]
        there = await scene.a.accepted(client)
        scene.a.hosting.hold(for_good=False)
        client.writer.close()
        await until(lambda: there.gone)
        scene.a.hosting.resume()
        await scene.a.drained()
        assert await other.at_end()
        assert [] == await scene.a.hosting.cut()

    play(story)
    assert [] == caplog.records


@pytest.mark.parametrize("for_good", [False, True])
def test_a_backend_that_is_switched_off(play: Callable[[Play], None], *, for_good: bool) -> None:
    """backend-transfer=no: nothing moves; requests in flight are answered, idle connections end."""

    async def story(scene: Scene) -> None:
        idle, slow = await scene.connect(), await scene.connect()
        assert ["A", "A"] == [await idle.ask(), await slow.ask()]
        slow.send(GET.replace(b"/ ", b"/slow "))
        await scene.first.asked.wait()
        scene.a.hosting.hold(for_good=for_good, crosses=False)
        deadline = time.monotonic() + SECONDS
        settling = asyncio.create_task(scene.a.hosting.settle(deadline, for_good=for_good))
        await turns()
        assert for_good != settling.done()
        scene.first.go.set()
        await settling
        frozen, left = scene.a.hosting.freeze()
        assert [] == frozen
        assert ["backend-transfer=no"] * 2 == [item.why for item in left]
        scene.a.commit(frozen, scene.b)
        assert b"A" == (await slow.receive())[1]
        await scene.a.drained()
        assert [True, True] == [await idle.at_end(), await slow.at_end()]

    play(story)
