# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services as authors write them, for `mypy --strict`; never run. Each `ignore` is a mistake found."""

import asyncio
import dataclasses
import ssl
from typing import assert_type

import upgrader
import upgrader.aio
from upgrader.backends import Memory, Tap


@upgrader.state("counters", version=2, readable_from=1)
class Counters:
    requests: int = 0
    streamed: int = upgrader.since(2, default=0)
    names: list[str] = upgrader.since(2, default_factory=list)


@upgrader.state("session")
class Session:
    sequence: int = 0


@upgrader.convert(Counters, 1)
def from_1(fields: dict[str, object]) -> dict[str, object]:
    return fields


@upgrader.state("rooms")
class Rooms:
    names: upgrader.Table[str, int] = dataclasses.field(default_factory=upgrader.Table)


assert_type(Rooms().names["a"], int)
Rooms().names["a"] = "b"  # type: ignore[assignment]
Counters(requests=1, streamed=2)
Counters(request=1)  # type: ignore[call-arg]
Counters(requests="1")  # type: ignore[arg-type]


def request(buffer: bytearray) -> int | None:
    at = buffer.find(b"\r\n\r\n")
    return at + 4 if at >= 0 else None


async def main() -> None:
    async with upgrader.attach("web", version="2") as instance:
        counters = instance.state(Counters)
        assert_type(counters, upgrader.Declared[Counters])
        assert_type(counters.value.requests, int)
        listener = instance.listener("http", bind="127.0.0.1:8080")
        assert_type(listener, upgrader.Listener)
        cache = instance.backend("cache", Memory(4096))
        assert_type(cache, Memory)
        assert_type(cache.map()[0], int)
        assert_type(instance.child("worker", ["sleep", "9"]).exit_code, int | None)
        instance.backend("cache", 4096)  # type: ignore[type-var]
        queries = instance.datagrams("dns")
        assert_type(queries, upgrader.Datagrams)

        @instance.connections(listener, state=Session)
        async def talk(peer: upgrader.Peer[Session], counters: Counters) -> None:
            async for message in peer.messages(request, limit=65536):
                assert_type(message, bytes)
                counters.requests += 1
                peer.state.sequence += 1
                peer.state.sequences += 1  # type: ignore[attr-defined]
                await peer.write(message)
                await peer.write("text")  # type: ignore[arg-type]
            async for line in peer.lines():
                assert_type(line, bytes)
            async with peer.safe():
                await asyncio.sleep(0.05)
            assert_type(await peer.readexactly(3), bytes)
            assert_type(await peer.read(3), bytes)
            assert_type(peer.address, str)
            assert_type(peer.adopted, bool)
            peer.close()

        @instance.verify
        async def sane(counters: Counters) -> None:
            if counters.requests < 0:
                raise upgrader.VerifyError("negative")

        async def every_minute(counters: Counters) -> None:
            async with instance.turn():
                counters.streamed += 1

        assert_type(await instance.serve(tasks=[every_minute]), upgrader.Ended)
        assert_type(instance.generation, int)


class Lines(upgrader.aio.Adapter):
    speaks = "lines"

    def factory(self) -> asyncio.BaseProtocol:
        return asyncio.Protocol()

    def idle(self, protocol: asyncio.BaseProtocol) -> bool:
        return True


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())


async def libraries(tls: ssl.SSLContext) -> None:
    async with upgrader.attach("web") as instance:
        listener = instance.listener("http", bind="127.0.0.1:8080")
        instance.protocols(listener, Lines(), tls=tls)
        instance.protocols(listener, asyncio.Protocol)  # type: ignore[arg-type]
        server = await upgrader.aio.start_server(handle, "127.0.0.1", 7000, stateless=True)
        assert_type(server, upgrader.aio.Server)
        async with server:
            await server.serve_forever()


def blocking() -> None:
    with upgrader.attach("web") as instance:
        assert_type(instance, upgrader.Instance)
        counters = instance.state(Counters)
        inbox = instance.datagrams("inbox", bind="unix:/run/web/inbox")
        listener = instance.listener("http")
        instance.drop("old")
        for backend in instance.serve(inbox, listener):
            if backend is inbox:
                data, _ = inbox.recvfrom()
                assert_type(data, bytes)
                counters.value.requests += 1
            else:
                sock, _ = listener.accept()
                sock.close()
        uplink = instance.backend("uplink", Tap("tap0"))
        for queue in instance.serve(uplink):
            assert_type(queue, Tap)
        for either in instance.serve(uplink, inbox):
            assert_type(either.fileno(), int)
        with instance.turn():
            pass
