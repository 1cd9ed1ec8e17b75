# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rounds on a channel: paced, bounded, and whoever lies at the other end takes nothing over."""

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from tests.unit.copied import Both, Item
from tests.unit.played import DestinationProcess, Here, make_piece
from upgrader.codes import Code
from upgrader.errors import ProtocolError, UnreadableState
from upgrader.instance.copying import Copying
from upgrader.instance.live_destination import LiveDestination
from upgrader.instance.live_source import LiveSource, MigrationRequest
from upgrader.protocol import channel, records
from upgrader.protocol.fd import Fd
from upgrader.protocol.switchover import Destination, Event, Source


class Bench:
    """A source that copies, and the other end of its channel. `left`: bytes, after each round."""

    def __init__(self) -> None:
        self.source, self.peer = channel.pair()
        self.client, connection = socket.socketpair()
        self.here = Here([socket.create_server(("127.0.0.1", 0)), connection])
        self.process = DestinationProcess(lambda: None)
        self.clock = 0.0
        self.both = Both(200)
        self.live_source = LiveSource(
            MigrationRequest(self.source, self.process, 3), self.here,
            limit=1.0, timeout=20.0, clock=lambda: self.clock,
        )  # fmt: skip
        self.live_source.side.feed(Event.COPY)
        self.both.rounds.begin()
        self.copying = Copying(
            self.live_source, self.both.rounds, limit=0.3, timeout=10.0, bandwidth=1000.0,
            clock=lambda: self.clock,
        )  # fmt: skip

    def say(self, record: records.Record) -> None:
        channel.send(self.peer, record, version=3)

    def heard(self) -> int:
        """How many pieces have come."""
        count = 0
        while item := channel.receive(self.peer, peek=False):
            assert isinstance(item[0], records.TablePiece)
            for fd in item[1]:
                fd.close()
            count += 1
        return count

    def until_sent(self) -> int:
        """Let time pass until a piece comes, or the copying is over."""
        while not self.heard():
            wait = self.copying.step()
            if wait is None:
                return 0
            self.clock += wait
        return 1

    def close(self) -> None:
        self.both.rounds.end()
        self.live_source.hang_up()
        for owner in (self.source, self.peer, self.client, self.process, self.here):
            owner.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_rounds_are_paced_and_loaded_before_the_freeze(bench: Bench) -> None:
    """As many bytes a second as `max-bandwidth` says; the freeze comes once the destination has all."""
    assert bench.until_sent()
    assert bench.clock >= bench.both.rounds.bytes / 1000 * 0.5
    assert bench.copying.step() == 1.0  # the destination has not loaded it
    bench.say(records.Progress(1))
    bench.both.stock.items["1"] = Item(5)
    while bench.copying.step() is not None:
        bench.clock += 1.0
        bench.heard()
        if bench.live_source.in_flight:
            bench.say(records.Progress(2))
    assert bench.copying.event is None
    assert Source.COPYING is bench.live_source.state
    assert bench.here.serving


def test_a_table_that_changes_faster_has_an_end(bench: Bench) -> None:
    """Then it is frozen, whatever is left."""
    bench.copying._limit = 0.0
    sent, key = 0, 0
    while bench.clock < 100:
        for _ in range(50):
            key += 1
            bench.both.stock.items[str(key % 300)] = Item(key)
        wait = bench.copying.step()
        if wait is None:
            break
        bench.clock += min(wait, 0.2)
        if bench.heard():
            sent += 1
            bench.say(records.Progress(sent))
    assert bench.copying.event is None
    assert 9 < bench.clock < 12
    assert bench.both.rounds.left


LIARS: list[tuple[records.Record, str]] = [
    (records.Progress(2), "has loaded 2 pieces of 1"), (records.Progress(0), "has loaded 0 pieces"),
    (records.Progress(-1), "has loaded -1"), (records.Ack(3, 1), "what it was not sent"),
    (records.Ack(), "what it was not sent"), (records.Go(), "Go is no record for a source"),
    (records.TablePiece(0), "TablePiece is no record"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "why"), LIARS, ids=[why for _, why in LIARS])
def test_a_destination_that_lies_takes_nothing_over(
    record: records.Record, why: str, bench: Bench
) -> None:
    assert bench.until_sent()
    bench.say(record)

    assert bench.copying.step() is None
    assert Event.UNREADABLE is bench.copying.event
    bench.live_source.side.feed(bench.copying.event)
    assert Source.SERVING is bench.live_source.state
    assert why in bench.live_source.reason
    assert bench.process.killed
    assert bench.here.serving


def test_a_destination_that_loads_nothing_has_a_limit(bench: Bench) -> None:
    """Half of migration-timeout, as nobody waits; then the source goes on without it."""
    assert bench.until_sent()
    began = bench.clock
    while (wait := bench.copying.step()) is not None:
        bench.clock += wait
    assert Event.DEADLINE is bench.copying.event
    assert Code.NOT_READY_IN_TIME is bench.live_source.code
    assert 8 < bench.clock - began < 12


def test_a_channel_that_takes_nothing(bench: Bench) -> None:
    """The source serves on; nobody has waited for it."""
    with contextlib.suppress(BlockingIOError):
        while True:
            channel.send(bench.source, records.Go(), version=3)
    while (wait := bench.copying.step()) is not None:
        bench.clock += wait
    assert Event.NOT_SENT is bench.copying.event
    bench.live_source.side.feed(Event.NOT_SENT)
    assert (Source.SERVING, True) == (bench.live_source.state, bench.here.serving)


def test_a_value_that_cannot_be_saved_ends_the_rounds(bench: Bench) -> None:
    bench.both.stock.items["1"] = object()  # type: ignore[assignment]
    while (wait := bench.copying.step()) is not None:
        bench.clock += wait
    assert Event.NOT_SENT is bench.copying.event
    assert "stock" in bench.live_source.reason


def test_an_abort_in_a_round(bench: Bench) -> None:
    bench.say(records.abort(Code.VERIFY_FAILED, "no"))

    assert bench.copying.step() is None
    assert Event.ABORT is bench.copying.event
    bench.live_source.side.feed(Event.ABORT)
    assert (Source.SERVING, "no") == (bench.live_source.state, bench.live_source.reason)


class There:
    """A destination that waits, and the source's end of its channel."""

    def __init__(self) -> None:
        self.source, ours = channel.pair()
        self.takeover, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side = LiveDestination(ours, line, timeout=20.0)
        self.side._stream = 3
        self.side.side.state = Destination.WAITING
        self._owners = (self.source, ours, self.takeover, line)

    def close(self) -> None:
        for owner in self._owners:
            owner.close()


@pytest.fixture
def there() -> Iterator[There]:
    there = There()
    yield there
    there.close()


@pytest.mark.parametrize(("number", "fds", "stream"), [(1, 1, 3), (0, 0, 3), (0, 2, 3), (0, 1, 2)])
def test_a_source_that_lies_is_refused(number: int, fds: int, stream: int, there: There) -> None:
    """No piece is left out, none comes twice, and each is one FD; what came is closed."""
    there.side._stream = stream
    before = len(os.listdir("/proc/self/fd"))
    channel.send(there.source, records.TablePiece(number), [there.takeover] * fds, version=3)

    assert Event.REFUSED is there.side.next_event()
    assert isinstance(there.side._error, ProtocolError)
    assert before == len(os.listdir("/proc/self/fd"))


def test_a_piece_is_loaded_and_said_to_be(there: There) -> None:
    loaded: list[int] = []
    there.side.on_piece = lambda piece: loaded.append(piece.fileno())
    for number in range(2):
        with make_piece().memfd as memfd:
            channel.send(there.source, records.TablePiece(number), [memfd], version=3)
        event = there.side.next_event()
        assert Event.PIECE is event
        assert there.side.side.feed(event) is None
        assert channel.receive(there.source, peek=False) == (records.Progress(number + 1), [])
    assert 2 == len(loaded)


def test_a_piece_that_cannot_be_loaded_refuses(there: There) -> None:
    def refuse(piece: Fd) -> None:
        raise UnreadableState("state 'x'", "no")

    there.side.on_piece = refuse
    with make_piece().memfd as memfd:
        channel.send(there.source, records.TablePiece(0), [memfd], version=3)
    found = there.side.side.feed(there.side.next_event())

    assert Event.REFUSED is found
