# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes in flight across a restart: every request is answered exactly once, and whole."""

import socket
import threading
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Chat

#: More than the kernel takes for two sockets.
SIZE = 8_000_000


def pattern(size: int) -> bytes:
    return b"".join(b"%08x" % number for number in range(size // 8))


def test_a_request_in_two_halves(chat: Chat) -> None:
    """Half of it before the restart, half after."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        client.send("ad")
        chat.restart(version=2)
        client.send("d\n")

        assert "2 2" == client.line()


def test_a_request_byte_by_byte(chat: Chat) -> None:
    """A restart after every byte."""
    chat.start()
    with chat.connect() as client:
        for byte in "add\n":
            client.send(byte)
            chat.restart()

        assert "1 1" == client.line()
        assert "2 2" == client.ask("add")


def test_pipelined_requests(chat: Chat) -> None:
    """Hundreds sent at once, the restart among them: all answered once, in order."""
    chat.start()
    with chat.connect() as client:
        client.send("add\n" * 500)
        assert "1 1" == client.line()
        chat.restart()

        assert [f"{n} {n}" for n in range(2, 501)] == [client.line() for _ in range(499)]


def test_an_unsent_response(chat: Chat) -> None:
    """Megabytes that the client does not read arrive whole, once, from three instances."""
    chat.start()
    with chat.connect() as client:
        client.send("big 4000000\nadd\n")
        assert b"00000000" == client.sock.recv(8, socket.MSG_PEEK)
        chat.restart()
        chat.restart(version=2)

        assert pattern(4_000_000).decode() == client.line()
        assert "1 1" == client.line()


def test_a_half_closed_connection(chat: Chat) -> None:
    """What was sent before the end is answered by the next instance, which sees the end, too."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.stop()
        client.send("add\nadd\nad")
        client.sock.shutdown(socket.SHUT_WR)
        chat.start()

        answers = client.rest()
        assert answers.startswith(b"2 2\n3 3\n")
        assert answers.removeprefix(b"2 2\n3 3\n") in (b"", b"goodbye\n")


def test_a_closing_connection(chat: Chat) -> None:
    """The handler is done, the client has not read all yet: the rest and the end come later."""
    chat.start()
    with chat.connect() as client:
        client.send("big 4000000\nbye\n")
        assert b"00000000" == client.sock.recv(8, socket.MSG_PEEK)
        chat.restart()

        assert pattern(4_000_000) + b"\n\ngoodbye\n" == client.rest()


def test_a_client_that_resets(chat: Chat) -> None:
    """One that goes away with megabytes unsent disturbs nobody, before or after a restart."""
    chat.start()
    with chat.connect() as other:
        for restart in (False, True):
            with chat.connect() as client:
                client.send("big 4000000\n")
                client.sock.recv(1)
                if restart:
                    chat.restart()
            assert "x" == other.ask("echo x")
        chat.restart()
        assert "x" == other.ask("echo x")
        assert "Traceback" not in chat.service.stderr
        assert "Exception" not in chat.service.stderr


def test_a_long_stream(aio_chat: Chat) -> None:
    """A response in chunks goes on where it was, as the connection's state says."""
    aio_chat.start()
    with aio_chat.connect() as client:
        client.send("stream 3000\n")
        expected = iter(range(1, 3001))
        for number in expected:
            assert f"chunk {number}" == client.line()
            if number in (10, 500, 2000):
                aio_chat.restart()
        assert "x" == client.ask("echo x")


@pytest.mark.parametrize("readers", [1, 5])
def test_a_broadcast_arrives(readers: int, chat: Chat) -> None:
    """What one handler writes to all others comes to each, at once and after a restart."""
    chat.start()
    clients = [chat.connect() for _ in range(readers)]
    for client in clients:
        assert "1" == client.ask("echo 1")
    clients[0].send("all " + "x" * 900_000 + "\n")
    if readers == 5:
        chat.restart()
    for client in reversed(clients):  # it is more than a socket buffer takes
        assert 900_000 == len(client.line())
        client.close()


def test_writers_that_wait_for_one_slow_reader(aio_chat: Chat) -> None:
    """Several handlers write to one client that does not read: all go on once it does."""
    aio_chat.start()
    with aio_chat.connect() as slow:
        assert "1" == slow.ask("echo 1")
        clients = [aio_chat.connect() for _ in range(4)]
        for client in clients:
            client.send("all " + "x" * 300_000 + "\n")

        def read(reader: object) -> None:
            for _ in range(4):
                assert 300_000 == len(reader.line())  # type: ignore[attr-defined]

        threads = [threading.Thread(target=read, args=(r,)) for r in (slow, *clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            assert "still" == client.ask("echo still")
            client.close()


@pytest.mark.parametrize("mode", ["live", "restart"])
def test_what_stays_is_sent_to_each_client_as_it_reads(mode: str, tmp_path: Path) -> None:
    """One that does not read keeps no other waiting, though nothing but the listener moves."""
    environment = {"UPGRADER_BACKEND_TRANSFER": "no", "UPGRADER_DRAIN_TIMEOUT": "3s"}
    chat = Chat("blocking", tmp_path, **environment)
    with chat.service:
        chat.start()
        process = chat.service.process
        assert process is not None
        with chat.connect() as slow, chat.connect() as quick:
            for client in (slow, quick):
                client.send(f"big {SIZE}\n")
                assert "0000" == client.take(4)
            if mode == "live":
                chat.service.live(chat.command())
            else:
                process.terminate()
            assert SIZE - 3 == len(quick.take(SIZE - 3))
            assert quick.gone() if mode == "live" else process.wait(DEADLINE) == 0
