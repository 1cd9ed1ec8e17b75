# SPDX-License-Identifier: LGPL-2.1-or-later
"""What it costs that a WebSocket can move: echoes of 100 bytes through uvicorn's implementations, with
and without, one after the other in each round."""

import asyncio
import time
import warnings
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from upgrader.integrations.crossing import Traffic
from upgrader.integrations.uvicorn_websockets import movable

ROUNDS, ECHOES = 15, 2000
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
FRAME = b"\x81\xe4mask" + bytes(100)


class Nowhere(asyncio.Transport):
    """A transport that counts what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.writes = 0

    def write(self, data: Any) -> None:
        self.writes += 1

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: Any = None, low: Any = None) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        await send({"type": "websocket.send", "text": message["text"]})


async def microseconds(protocol_class: Any, config: uvicorn.Config) -> float:
    """How much processor an echo takes: others run beside."""
    transport = Nowhere()
    protocol = protocol_class(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(transport)
    protocol.data_received(HANDSHAKE)
    for _ in range(20):
        await asyncio.sleep(0)
    began = time.process_time()
    for _ in range(ECHOES):
        wanted = transport.writes + 1
        protocol.data_received(FRAME)
        while transport.writes < wanted:
            await asyncio.sleep(0)
    return (time.process_time() - began) / ECHOES * 1e6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ws", ["websockets", "websockets-sansio", "wsproto"])
def test_an_echo(ws: Any) -> None:
    """At most 7 microseconds more is what is promised."""

    async def measure() -> tuple[float, float]:
        config = uvicorn.Config(echo, ws=ws, log_level="critical", ws_ping_interval=None)
        config.load()
        plain = config.ws_protocol_class
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for times, kind in zip(both, (plain, movable(plain, Traffic())), strict=True):
                times.append(await microseconds(kind, config))
        return min(both[0]), min(both[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = asyncio.new_event_loop()
        without, moving = loop.run_until_complete(measure())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
    print(
        f"\n{ws}: {moving - without:+.1f} us for each echo, {moving / without:.2f} times {without:.0f} us"
    )
