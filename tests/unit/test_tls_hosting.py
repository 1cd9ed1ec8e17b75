# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS connections of unmodified libraries move: real sockets, asyncio and uvloop, real clients."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.unit.hosting import SECONDS, Application, Client, Side, adapter_of, turns, until
from tests.unit.tls_pairs import CERTIFICATE, client_context, server_context
from upgrader.aio.tls_layer import TlsCrossing
from upgrader.tls.listener import TlsListener

Prepare = Callable[[ssl.SSLContext], object]


class TlsScene:
    """A listener of three instances, which serve it one after the other."""

    def __init__(self, stack: contextlib.AsyncExitStack, sides: list[Side]) -> None:
        self._stack = stack
        self.sides = sides

    async def connect(self, context: ssl.SSLContext | None = None) -> Client:
        address = self.sides[0].listener.socket.getsockname()
        opened = await asyncio.open_connection(
            *address, ssl=context or client_context(), limit=16 << 20
        )
        self._stack.callback(opened[1].close)
        return Client(*opened)

    async def upgrade(self, number: int) -> list[str]:
        """The instance of this number gives all to the next one; returns why something stays."""
        source, to = self.sides[number : number + 2]
        frozen, left = await source.collect(to)
        source.commit(frozen, to)
        return [item.why for item in left]


Story = Callable[[TlsScene], Coroutine[Any, Any, None]]
Play = Callable[..., None]


@pytest.fixture(params=["asyncio h11", "uvloop httptools", "asyncio aiohttp", "uvloop aiohttp"])
def play(request: pytest.FixtureRequest) -> Play:
    loop, library = request.param.split()
    factory: Any = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop]

    @contextlib.asynccontextmanager
    async def made(*prepare: Prepare) -> AsyncIterator[TlsScene]:
        async with contextlib.AsyncExitStack() as stack:
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            sock.setblocking(False)
            sides = []
            for number, name in enumerate("ABC"):
                context = server_context()
                for change in prepare[:1] if number == 0 else prepare[-1:]:
                    change(context)
                adapter = await stack.enter_async_context(adapter_of(library, Application(name)))
                sides.append(Side(adapter, sock, context, TlsCrossing(TlsListener(context))))
            sides[0].hosting.open()
            yield TlsScene(stack, sides)
            for side in sides:
                side.hosting.hold(for_good=True)
                await side.hosting.cut()

    def run(story: Story, *prepare: Prepare) -> None:
        async def scene() -> None:
            async with asyncio.timeout(2 * SECONDS), made(*prepare) as made_scene:
                await story(made_scene)

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scene())

    return run


def test_idle_connections_move(play: Play) -> None:
    """Twice, and large answers are right; no handshake is made again."""

    async def story(scene: TlsScene) -> None:
        clients = [await scene.connect() for _ in range(3)]
        assert ["A"] * 3 == [await client.ask() for client in clients]
        for number, name in enumerate("BC"):
            assert [] == await scene.upgrade(number)
            assert [name] * 3 == [await client.ask() for client in clients]
            body = (await _large(clients[0]))[1]
            assert b"x" * len(body) == body
        new = await scene.connect()
        assert "C" == await new.ask()
        assert not any(side.hosting.connections for side in scene.sides[:2])

    play(story)


async def _large(client: Client) -> tuple[bytes, bytes]:
    client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    return await client.receive()


def test_what_comes_meanwhile_is_answered_there(play: Play) -> None:
    """A request while all is held: opened here or not, it is read there, once."""

    async def story(scene: TlsScene) -> None:
        opened, unopened = [await scene.connect() for _ in range(2)]
        assert ["A", "A"] == [await client.ask() for client in (opened, unopened)]
        source, to = scene.sides[:2]
        source.hosting.ask_tls(live=True, trust=to.moving.trust if to.moving else None)
        source.hosting.hold(for_good=False)
        opened.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await source.has_read(opened)
        await turns()
        # It is not asked to read any more: what comes lies sealed in the loop's own buffer.
        opened.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await source.has_read(opened)
        unopened.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        frozen, left = source.hosting.freeze()
        assert ([], 2) == (left, len(frozen))
        source.commit(frozen, to)
        answers = [(await client.receive())[1] for client in (opened, opened, unopened)]
        assert [b"B"] * 3 == answers

    play(story)


def test_a_failed_upgrade_changes_nothing(play: Play) -> None:
    """Frozen and resumed, the very connection goes on in OpenSSL, with what had come meanwhile."""

    async def story(scene: TlsScene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        for _ in range(2):
            frozen, _ = await scene.sides[0].collect(scene.sides[1])
            assert 1 == len(frozen)
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            scene.sides[0].hosting.resume()
            assert b"A" == (await client.receive())[1]
        assert [] == await scene.upgrade(0)
        assert "B" == await client.ask()

    play(story)


def test_a_restart_drains(play: Play) -> None:
    """As ever: only a live upgrade asks."""

    async def story(scene: TlsScene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        frozen, left = await scene.sides[0].collect()
        assert ([], ["TLS connections move in a live upgrade only"]) == (
            frozen,
            [item.why for item in left],
        )
        scene.sides[0].hosting.resume()
        assert "A" == await client.ask()

    play(story)


def _require(context: ssl.SSLContext) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(CERTIFICATE)


def _require_other(context: ssl.SSLContext) -> None:
    _require(context)
    context.load_verify_locations(cadata=ssl.create_default_context().get_ca_certs(True)[0])


@pytest.mark.parametrize("changed", [False, True])
def test_certificates_of_clients(play: Play, changed: bool) -> None:
    """Who was let in by a certificate moves where the same ones are trusted, and not elsewhere."""

    async def story(scene: TlsScene) -> None:
        context = client_context()
        context.load_cert_chain(CERTIFICATE)
        client = await scene.connect(context)
        assert "A" == await client.ask()
        why = await scene.upgrade(0)
        refused = "the new version trusts other certificates of clients, or one cannot tell"
        assert ([refused] if changed else []) == why
        assert ("A" if changed else "B") == await client.ask()

    play(story, _require, _require_other if changed else _require)


def test_tls_1_2_stays(play: Play) -> None:
    """It has its last answer from the source."""

    async def story(scene: TlsScene) -> None:
        context = client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        old, new = await scene.connect(context), await scene.connect()
        assert ["A", "A"] == [await client.ask() for client in (old, new)]
        assert ["it speaks TLSv1.2"] == await scene.upgrade(0)
        assert ["A", "B"] == [await client.ask() for client in (old, new)]

    play(story)


def test_attacked_connections_get_the_alert(play: Play) -> None:
    """A record that the key does not open: the alert is sent although the loop drops what it holds, the
    client is told, and the application gets nothing."""

    async def story(scene: TlsScene) -> None:
        client = await scene.connect()
        assert "A" == await client.ask()
        assert [] == await scene.upgrade(0)
        assert "B" == await client.ask()
        client.writer.get_extra_info("socket")
        below = client.writer.get_extra_info("socket").fileno()
        with socket.socket(fileno=below) as sock:
            try:
                sock.send(b"\x17\3\3\0\x20" + bytes(32))
            finally:
                sock.detach()
        with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
            await client.receive()
        assert "BAD_RECORD_MAC" in str(caught.value).upper().replace(" ", "_")
        await until(lambda: all(each.gone for each in scene.sides[1].hosting.connections))

    play(story)
