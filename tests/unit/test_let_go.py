# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has moved is read by nobody here any more, while our copies of it are open; and a crowd of it is made
of all whose handlers wait with nothing in hand."""

import asyncio
import os
import select
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import upgrader
from upgrader.aio import readers
from upgrader.aio.handled_connection import HandledConnection
from upgrader.aio.safe_points import SafePoints
from upgrader.instance.connection import ConnectionStream
from upgrader.instance.freeze import freeze_all
from upgrader.instance.frozen import FrozenCrowd
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.state_codec import encode


@upgrader.state("number")
@dataclass
class Number:
    value: Any = 0


@pytest.fixture
def ends() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(4)]
    yield pairs
    for pair in pairs:
        for sock in pair:
            sock.close()


def watched(number: int) -> bool:
    """Whether the loop watches an FD for reading; it does not afterwards."""
    return asyncio.get_running_loop().remove_reader(number)


async def ready(sock: socket.socket) -> None:
    """Wait until something can be read, and the loop has had its turn after that."""
    while not select.select([sock], [], [], 0)[0]:
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)


def in_loop(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 10))


def test_what_comes_after_it_has_moved(ends: list[tuple[socket.socket, socket.socket]]) -> None:
    """It stays in the socket, for the next instance, and wakes this loop once."""

    async def story() -> None:
        here, there = ends[0]
        points = SafePoints()
        points.open()
        connection = HandledConnection(
            "door", ConnectionStream(here), None, points, lambda _: None, adopted=False
        )
        reading = asyncio.ensure_future(connection.read(10))
        await asyncio.sleep(0)
        connection.let_go()
        there.send(b"late")
        await ready(here)
        assert not watched(here.fileno())
        assert not reading.done()
        assert b"late" == here.recv(10)
        reading.cancel()

    in_loop(story)


def test_our_copy_is_closed(ends: list[tuple[socket.socket, socket.socket]]) -> None:
    """The loop does not watch its number any more, which is somebody else's soon."""

    async def story() -> None:
        here, _ = ends[0]
        connection = HandledConnection(
            "door", ConnectionStream(here), None, SafePoints(), lambda _: None, adopted=False
        )
        reading = asyncio.ensure_future(connection._wait_readable())
        await asyncio.sleep(0)
        number, other = here.fileno(), os.dup(here.fileno())
        connection.let_go()
        connection.close_copy()
        assert not watched(number)
        os.close(other)
        reading.cancel()

    in_loop(story)


def test_only_copies_are_looked_for(ends: list[tuple[socket.socket, socket.socket]]) -> None:
    """A copy that the program watches is watched no more; a connection is not even asked what it is."""

    async def story() -> None:
        (backend, _), (connection, _), (other, _), _ = ends
        loop = asyncio.get_running_loop()
        copy = backend.dup()
        for sock in (backend, copy, connection, other):
            loop.add_reader(sock.fileno(), lambda: None)
        readers.watch_no_more(loop, [backend.fileno()], {connection.fileno()})
        numbers = [sock.fileno() for sock in (backend, copy, connection, other)]
        assert [False, False, True, True] == [watched(number) for number in numbers]
        copy.close()

    in_loop(story)


def test_handlers_that_wait_are_a_crowd(ends: list[tuple[socket.socket, socket.socket]]) -> None:
    """Whoever has something in hand is by itself, whoever is busy or cannot be saved stays, and whoever is
    gone is nowhere."""

    async def story() -> None:
        connections = [
            HandledConnection(
                "door", ConnectionStream(sock), Number(place), SafePoints(), lambda _: None,
                adopted=False,
            )
            for place, sock in enumerate(sock for pair in ends for sock in pair)
        ]  # fmt: skip
        for connection in connections[:-1]:
            connection.stream.waiting = Waiting.MESSAGE
        one, half, unsent, odd, lost, two, safe, busy = connections
        half.stream.inbox.buffer += b"half"
        unsent.stream.unsent += b"rest"
        odd.session.value = object()
        lost.stream.lost = True
        safe.stream.waiting = Waiting.SAFE
        moving, left, moved = freeze_all("door", connections)

        assert [one, half, unsent, two, safe] == moved
        assert ["state 'number' cannot be saved", "its handler is busy"] == [
            each.why[: len("state 'number' cannot be saved")] for each in left
        ]
        *alone, crowd = moving
        assert isinstance(crowd, FrozenCrowd)
        assert [encode(Number(0)), encode(Number(5))] == crowd.crowd.sessions
        assert [one.stream.sock.fileno(), two.stream.sock.fileno()] == crowd.numbers.tolist()
        assert [half.stream.sock, unsent.stream.sock, safe.stream.sock] == [
            each.sock for each in alone if not isinstance(each, FrozenCrowd)
        ]
        assert busy not in moved

    in_loop(story)
