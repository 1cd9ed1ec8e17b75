# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adapters of libraries that misbehave: nothing else is harmed by them."""

import asyncio
import socket
from typing import Any

import pytest

from tests.unit.hosting import (
    Client,
    Side,
)
from upgrader.aio import Adapter
from upgrader.errors import UnreadableState
from upgrader.instance.adopted import Adopted
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.kinds import Waiting


class Echo(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class EchoAdapter(Adapter):
    speaks = "echo"

    def factory(self) -> asyncio.BaseProtocol:
        return Echo()

    def idle(self, protocol: Any) -> bool:
        return True


class Failing(EchoAdapter):
    def idle(self, protocol: Any) -> bool:
        raise ValueError("as told")


class Vetoing(EchoAdapter):
    def save(self, protocol: Any) -> bytes | None:
        return None


class Refusing(EchoAdapter):
    def load(self, saved: bytes) -> asyncio.BaseProtocol:
        raise ValueError("as told")


@pytest.mark.parametrize(
    ("adapter", "why"), [(Failing(), "it is busy"), (Vetoing(), "its adapter holds it back")]
)
def test_an_adapter_that_says_no(adapter: Adapter, why: str) -> None:
    """Its connections stay, with the reason, and can still be served."""

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            sock.setblocking(False)
            side = Side(adapter, sock)
            side.hosting.open()
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            writer.write(b"one")
            assert b"one" == await reader.readexactly(3)
            frozen, left = await side.collect()
            assert ([], [why]) == (frozen, [item.why for item in left])
            side.hosting.resume()
            writer.write(b"two")
            assert b"two" == await reader.readexactly(3)
            side.hosting.hold(for_good=False)
            await side.hosting.cut()
            writer.close()

    asyncio.run(story())


class Broken(EchoAdapter):
    def factory(self) -> asyncio.BaseProtocol:
        raise ValueError("as told")


def test_an_adapter_that_makes_no_protocol(caplog: pytest.LogCaptureFixture) -> None:
    """Its clients are not left waiting, and the log says why."""

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            sock.setblocking(False)
            side = Side(Broken(), sock)
            side.hosting.open()
            client = Client(*await asyncio.open_connection(*sock.getsockname()))
            assert await client.at_end()
            client.writer.close()
            side.hosting.hold(for_good=True)

    asyncio.run(story())
    assert "adapter of echo failed" in caplog.text


def test_a_loader_that_refuses() -> None:
    """Before the Ack, so that the source can resume; what was saved as nothing cannot fail."""

    async def story() -> None:
        ours, theirs = socket.socketpair()
        with ours, Fd(theirs.detach()) as fd:
            side = Side(Refusing(), ours)
            state = ConnectionState(Waiting.MESSAGE, b"", b"", b"saved")
            adopted = Adopted("http", fd, identify(fd), state, None)
            with pytest.raises(UnreadableState, match="echo: ValueError: as told"):
                side.hosting.prepare([adopted])

    asyncio.run(story())
