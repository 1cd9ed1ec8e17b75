# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection without a loop: what is queued, what is lost, and what moves."""

import socket
import struct
from collections.abc import Iterator

import pytest

from upgrader.instance.connection import ConnectionStream, show_peer
from upgrader.instance.freeze import freeze
from upgrader.instance.frozen import Frozen
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.identity import identify
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Waiting

LARGE = b"x" * 8_000_000


@pytest.fixture
def ends() -> Iterator[tuple[ConnectionStream, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
        with here, there:
            yield ConnectionStream(here), there


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_what_does_not_go_out_is_kept(ends: tuple[ConnectionStream, socket.socket]) -> None:
    """It follows in order when it is flushed."""
    stream, there = ends
    stream.queue(LARGE)
    stream.queue(b"end")
    kept = len(stream.unsent)
    got = bytearray()
    while len(got) < len(LARGE) + 3:
        got += there.recv(1 << 20)
        stream.flush()

    assert 0 < kept < len(LARGE)
    assert got == LARGE + b"end"
    assert not stream.unsent


def test_a_reset_while_flushing(ends: tuple[ConnectionStream, socket.socket]) -> None:
    """The rest is dropped, the connection is lost, and writing says so."""
    stream, there = ends
    stream.queue(LARGE)
    reset(there)
    while not stream.lost:
        stream.flush()

    assert stream.eof
    assert not stream.unsent
    with pytest.raises(ConnectionResetError, match="the peer is gone"):
        stream.queue(b"x")


def test_a_reset_while_receiving(ends: tuple[ConnectionStream, socket.socket]) -> None:
    """What came before stays."""
    stream, there = ends
    there.send(b"abc")
    stream.receive()
    stream.queue(LARGE)
    reset(there)
    while not stream.lost:
        stream.receive()

    assert b"abc" == stream.inbox.buffer
    assert not stream.unsent


@pytest.mark.parametrize("waiting", [*Waiting, None])
def test_freezing(ends: tuple[ConnectionStream, socket.socket], waiting: Waiting | None) -> None:
    """At a safe point everything moves along; a busy one does not move."""
    stream, there = ends
    there.send(b"half")
    stream.receive()
    stream.queue(LARGE)
    stream.waiting = waiting
    found = freeze("door", stream, None)
    if waiting is None:
        assert LeftBehind("door", show_peer(stream.sock), "its handler is busy") == found
        return

    assert isinstance(found, Frozen)
    moved = found.state
    assert ConnectionState(waiting, b"half", bytes(stream.unsent), b"") == moved
    again = ConnectionStream(stream.sock, moved)
    assert (b"half", stream.unsent) == (again.inbox.buffer, again.unsent)
    assert (waiting, identify(stream.sock)) == (again.waiting, again.identity)


def test_the_peer_of_a_connection_that_its_loop_has_just_closed() -> None:
    """It is asked for in another thread, to describe the instance."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()

        assert "gone peer" == show_peer(ours)
        with pytest.raises(OSError, match="Bad file descriptor"):
            identify(ours)
