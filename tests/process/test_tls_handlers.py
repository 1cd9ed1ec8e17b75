# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections with a handler over TLS cross live upgrades; killed at each step, no nonce is used twice."""

import asyncio
import contextlib
import os
import random
import signal
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE
from tests.process.tls_clients import CERTIFICATE, OpenSsl, Recorded, free_port
from tests.support import eventually
from tests.tables import publish
from upgrader.testing import Service, ServiceError

HERE = Path(__file__).parent


class TlsBoard:
    """The service of tls_board.py, in the versions that a test asks for."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.directory = directory
        self.service = Service(environment={"UPGRADER_TLS": "move"}, timeout=DEADLINE)
        self._clients = 0

    def command(self, version: str, *at: str) -> list[str]:
        program = str(HERE / "tls_board.py")
        return [sys.executable, program, str(self.port), str(CERTIFICATE), version, *at]

    def connect(self) -> Recorded:
        self._clients += 1
        client = Recorded(self.port, self.directory / f"keys-{self._clients}")
        assert "welcome TLSv1.3" == client.line()
        return client


@pytest.fixture
def board(tmp_path: Path) -> Iterator[TlsBoard]:
    board = TlsBoard(tmp_path)
    with board.service:
        yield board


def test_handlers_go_on(board: TlsBoard) -> None:
    """With their state, with half a line that was sent before, through three live upgrades; a restart
    drains them."""
    board.service.start(board.command("one"))
    with board.connect() as client, board.connect() as other:
        assert "one 1 a" == client.ask("a")
        for number, version in enumerate(("two", "three", "four"), 2):
            client._call(client._object.write, b"be")
            assert 0 == board.service.live(board.command(version)).left_behind
            client._call(client._object.write, b"gun\n")
            assert f"{version} {number} begun" == client.line()
            late = board.service.describe()["late"]  # loaded since it was ready
            assert [] == [name for name in late if "tls" in name or "cryptography" in name]
        assert "four 1 x" == other.ask("x")
        assert 2 <= client.require_no_nonce_twice()
        board.service.upgrade(board.command("five"))
        with pytest.raises((ConnectionError, OSError)):
            client.ask("gone")
    with board.connect() as client:
        assert "five 1 new" == client.ask("new")


def test_key_updates_of_handlers(board: TlsBoard) -> None:
    """Before the move with an answer that is owed, and after it."""
    board.service.start(board.command("one"))
    with OpenSsl(board.port) as client:
        client.expect(b"welcome TLSv1.3")
        client.update_keys(both=True)
        board.service.live(board.command("two"))
        client.send("first")
        client.expect(b"two 1 first")
        client.update_keys(both=True)
        client.send("second")
        client.expect(b"two 2 second")


# Killed at each step


def destination_dies_in_its_check(board: TlsBoard, client: Recorded) -> str:
    with pytest.raises(ServiceError):
        board.service.live(board.command("two", "verify"))
    return "one"


def destination_is_killed_in_its_check(board: TlsBoard, client: Recorded) -> str:
    with in_the_check(board) as (process, _):
        client.send("meanwhile")
        os.kill(process, signal.SIGKILL)
        assert "one 2 meanwhile" == client.line()
    return "one"


def destination_comes_too_late(board: TlsBoard, client: Recorded) -> str:
    """The source has given up waiting, and serves on; then the destination would."""
    with in_the_check(board) as (_, go_on):
        client.send("meanwhile")
        assert "one 2 meanwhile" == client.line()
        go_on()
    return "one"


def source_is_killed_in_the_freeze(board: TlsBoard, client: Recorded) -> str:
    """The destination finds that it is alone, and owns everything."""
    source = board.service.process
    assert source
    with in_the_check(board) as (_, go_on):
        client.send("meanwhile")
        os.kill(source.pid, signal.SIGKILL)
        go_on()
        assert "two 2 meanwhile" == client.line()
    return "two"


def destination_dies_at_the_commit(board: TlsBoard, client: Recorded) -> str:
    """It may have sealed something: nobody goes on with these connections."""
    with contextlib.suppress(ServiceError):
        board.service.live(board.command("two", "commit"))
    return ""


def source_dies_after_the_commit(board: TlsBoard, client: Recorded) -> str:
    source = board.service.process
    assert source
    board.service.live(board.command("two"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(source.pid, signal.SIGKILL)
    return "two"


@contextlib.contextmanager
def in_the_check(board: TlsBoard) -> Iterator[tuple[int, Callable[[], None]]]:
    """A live upgrade whose destination has loaded all, and stands in its check: its process, and what
    lets it go on."""
    file = board.directory / "go"
    live = board.service.begin_live(board.command("two", str(file)))
    eventually((board.directory / "go.there").exists)
    process = int(board.service.describe()["migration"]["pid"])
    try:
        yield process, file.touch
    finally:
        file.touch()
        with contextlib.suppress(ServiceError):
            live.wait()


@pytest.mark.parametrize(
    "step",
    [
        destination_dies_in_its_check,
        destination_is_killed_in_its_check,
        destination_comes_too_late,
        source_is_killed_in_the_freeze,
        destination_dies_at_the_commit,
        source_dies_after_the_commit,
    ],
)
def test_no_nonce_is_used_twice(board: TlsBoard, step: Callable[[TlsBoard, Recorded], str]) -> None:
    """Whoever is killed, and whenever: every record that a client has got was sealed under the next
    nonce, and who goes on with a connection is one process."""
    if step is destination_comes_too_late:
        board.service.environment["UPGRADER_DOWNTIME_LIMIT"] = "1s"
    else:
        board.service.environment["UPGRADER_DOWNTIME_LIMIT"] = "20s"
    board.service.start(board.command("one"))
    with board.connect() as client, board.connect() as idle:
        assert "one 1 before" == client.ask("before")

        owner = step(board, client)

        for each in (client, idle):
            if owner:
                assert each.ask("after").startswith(owner)
            else:
                with pytest.raises((ConnectionError, OSError)):
                    each.ask("after")
        assert client.require_no_nonce_twice() >= 2
        assert idle.require_no_nonce_twice() >= 1


# Many, with traffic in both directions


class Talker:
    """A client that never stops talking, and checks every byte."""

    def __init__(self) -> None:
        self.versions: list[str] = []
        self.lines = 0

    async def run(self, port: int, context: ssl.SSLContext, stop: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            assert b"welcome TLSv1.3\n" == await reader.readline()
            while not stop.is_set():
                said = random.randbytes(random.randrange(1, 12_000)).hex().encode()
                writer.write(said + b"\n")
                version, number, heard = (await self._line(reader)).split()
                self.lines += 1
                assert (self.lines, said) == (int(number), heard)
                if not self.versions or version.decode() != self.versions[-1]:
                    self.versions.append(version.decode())
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        async with asyncio.timeout(DEADLINE):
            return await reader.readline()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_traffic_in_both_directions(board: TlsBoard, loop: str) -> None:
    """Clients that talk all the time, each on its one connection: every byte is right, every line is
    counted once, and all have seen all versions, in their order."""
    play_traffic(board, loop, clients=20, upgrades=2)


@pytest.mark.matrix
def test_more_traffic(tmp_path: Path) -> None:
    """The same with 200 clients and ten upgrades, on each loop."""
    rows = []
    for loop in ("asyncio", "uvloop"):
        board = TlsBoard(tmp_path / loop)
        board.directory.mkdir()
        with board.service:
            lines = play_traffic(board, loop, clients=200, upgrades=10)
        rows.append([loop, "200", "10", str(lines), "0", "0"])
    publish(
        "tls", ["loop", "connections", "live upgrades", "lines", "wrong", "new handshakes"], rows
    )


def play_traffic(board: TlsBoard, loop: str, *, clients: int, upgrades: int) -> int:
    """Raises unless all is right; returns how many lines were said and answered."""
    board.service.environment["LOOP"] = loop
    board.service.start(board.command("0"))
    talkers = [Talker() for _ in range(clients)]
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.check_hostname = False

    async def talk() -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for talker in talkers:
                group.create_task(talker.run(board.port, context, stop))
            for number in range(1, upgrades + 1):
                command = board.command(str(number))
                status = await asyncio.to_thread(board.service.live, command)
                assert 0 == status.left_behind
                await all_have_seen(str(number))
            stop.set()

    async def all_have_seen(version: str) -> None:
        async with asyncio.timeout(DEADLINE):
            while not all(talker.versions[-1:] == [version] for talker in talkers):
                await asyncio.sleep(0.01)

    asyncio.run(talk())
    wanted = [str(number) for number in range(upgrades + 1)]
    assert [wanted] * clients == [talker.versions for talker in talkers]
    return sum(talker.lines for talker in talkers)
