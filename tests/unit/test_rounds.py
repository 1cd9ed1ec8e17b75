# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables in rounds: all that is written crosses, nothing that comes is trusted, and nobody waits."""

import contextlib
import copy
import dataclasses
import os
import pickle
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

import upgrader
from tests.unit.golden import PIECE, STREAMS, piece_bytes
from tests.unit.played import DestinationProcess, Here, make_piece
from upgrader.codes import Code
from upgrader.errors import ImageError, ProtocolError, UnreadableState, UnsavableState
from upgrader.instance.copying import Copying
from upgrader.instance.declarations import Declarations
from upgrader.instance.live_destination import LiveDestination
from upgrader.instance.live_source import LiveSource, MigrationRequest
from upgrader.instance.offer import Offer
from upgrader.instance.rounds import Rounds
from upgrader.instance.save import Readers
from upgrader.protocol import channel, image, records, table_pieces
from upgrader.protocol.fd import Fd
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import describe, load, save
from upgrader.protocol.switchover import Destination, Event, Source
from upgrader.protocol.table import retire
from upgrader.protocol.table_pieces import Head, Piece, Writing
from upgrader.protocol.table_reader import TableReader
from upgrader.protocol.varlink_types import Trial


class Item(msgspec.Struct, frozen=True):
    number: int
    text: str = ""


@upgrader.state("stock")
class Stock:
    count: int = 0
    items: upgrader.Table[str, Item] = dataclasses.field(default_factory=upgrader.Table)
    names: upgrader.Table[int, str] = dataclasses.field(default_factory=upgrader.Table)

    def __post_init__(self) -> None:
        self.begun_with = len(self.items)
        self.same_items = self.items


ALL = {"stock.items": 1, "stock.names": 1}


def offer(version: int = 1, tables: dict[str, int] = ALL) -> Offer:
    return Offer(Readers({"stock": version}), stream=3, tables=tables)


class Both:
    """A state that is copied, and what reads it."""

    def __init__(self, items: int = 1000) -> None:
        self.declarations = Declarations("x")
        self.declared = self.declarations.add_state(Stock)
        self.declared.fill(None)
        self.stock = self.declared.value
        self.stock.items.update({str(n): Item(n) for n in range(items)})
        rounds = Rounds.of(self.declarations, offer())
        assert rounds
        self.rounds = rounds
        self.reader = TableReader({"stock": self.declared.description})

    def round(self) -> None:
        while not self.rounds.at_end:
            if piece := self.rounds.work():
                self.reader.add(piece.memfd)

    def finish(self) -> SavedState:
        for piece in self.rounds.finish():
            self.reader.add(piece.memfd)
        return self.rounds.save("stock", self.declared) or save(self.stock)

    def loaded(self, saved: SavedState) -> Stock:
        return load(Stock, saved, lambda there: self.reader.fill(saved, there))[0]


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both()
    yield both
    both.rounds.end()
    assert upgrader.Table is type(both.stock.items)


WRITES: list[Callable[[Any], object]] = [
    lambda t: t.__setitem__("1", Item(-1)), lambda t: t.__setitem__("new", Item(-2)),
    lambda t: t.__delitem__("2"), lambda t: t.pop("3"), lambda t: t.pop("none", None),
    lambda t: t.popitem(), lambda t: t.setdefault("4", Item(-3)),
    lambda t: t.setdefault("newer", Item(-4)), lambda t: t.update({"5": Item(-5)}, six=Item(-6)),
    lambda t: t.update([("7", Item(-7))]), lambda t: t.__ior__({"8": Item(-8)}), lambda t: t.clear(),
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("when", ["in the first round", "after it", "in the freeze"])
def test_every_way_to_write_is_seen(write: Callable[[Any], object], when: str, both: Both) -> None:
    both.rounds.begin()
    if when == "in the first round":
        both.rounds.work()
        write(both.stock.items)
    both.round()
    if when == "after it":
        write(both.stock.items)
        both.rounds.again()
        both.round()
    if when == "in the freeze":
        write(both.stock.items)

    assert both.stock == both.loaded(both.finish())


def test_whatever_is_written_in_between(both: Both) -> None:
    """At random, in both tables, over many rounds."""
    choose = random.Random(3)
    both.rounds.begin()
    for number in range(20_000):
        key = choose.randrange(2000)
        if choose.random() < 0.2:
            both.stock.items.pop(str(key), None)
        else:
            both.stock.items[str(key)] = Item(number)
        both.stock.names[key] = str(number)
        if number % 50 == 0:
            if both.rounds.at_end:
                both.rounds.again()
            if piece := both.rounds.work():
                both.reader.add(piece.memfd)

    assert both.stock == both.loaded(both.finish())
    assert both.rounds.round > 3


def test_what_is_left_becomes_less(both: Both) -> None:
    """It is told in bytes, and is nothing at the end."""
    both.rounds.begin()
    both.round()
    assert both.rounds.left == 0
    both.stock.items["1"] = Item(5)
    assert 0 < both.rounds.left < both.rounds.bytes / 100
    both.rounds.again()
    both.round()
    assert (2, 0) == (both.rounds.round, both.rounds.left)


def test_another_table_in_its_place_goes_whole(both: Both) -> None:
    """What has crossed of the one before is forgotten."""
    both.rounds.begin()
    both.round()
    both.stock.items = upgrader.Table({"only": Item(1)})
    saved = both.finish()

    assert both.stock == both.loaded(saved)


def test_what_a_state_makes_of_its_tables(both: Both) -> None:
    """`__post_init__` sees them as they are then, in rounds or whole, and may keep them."""
    for saved in (save(both.stock), None):
        if saved is None:
            both.rounds.begin()
            both.round()
        there = both.loaded(saved or both.finish())

        assert len(both.stock.items) == there.begun_with
        assert there.items is there.same_items


def test_a_table_in_two_fields(both: Both) -> None:
    """What is written to it is seen in both."""
    both.stock.names = both.stock.items  # type: ignore[assignment]
    rounds = Rounds.of(both.declarations, offer())
    assert rounds
    both.rounds = rounds
    both.rounds.begin()
    both.round()
    both.stock.items["new"] = Item(-1)
    saved = both.finish()

    assert ["items"] == [*(saved.tables or ())]
    whole = msgspec.msgpack.decode(saved.data)
    assert both.stock.items.keys() == whole["names"].keys()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_a_table_is_one_of_its_own(copied: Callable[[Any], Any], both: Both) -> None:
    """Also while changes are recorded, and of one that was given away."""
    both.rounds.begin()
    both.round()
    items = both.stock.items
    mine = copied(items)
    mine["mine"] = Item(1)

    assert upgrader.Table is type(mine)
    assert {**items, "mine": Item(1)} == mine
    assert both.rounds.left == 0
    given = upgrader.Table(items)
    retire(given)
    assert items == copied(given)


def test_a_value_that_cannot_be_saved(both: Both) -> None:
    both.rounds.begin()
    both.stock.items["1"] = object()  # type: ignore[assignment]
    with pytest.raises(UnsavableState, match="stock"):
        both.round()


def test_writing_goes_on_at_the_speed_of_a_dict_afterwards(both: Both) -> None:
    both.rounds.begin()
    both.rounds.end()
    both.stock.items["1"] = Item(9)
    assert both.rounds.left == 0


# Which destination gets rounds


def made(declarations: Declarations, of: Offer) -> bool:
    return Rounds.of(declarations, of) is not None


def test_an_older_library_gets_the_whole_table() -> None:
    """It offers no tables, or an older stream; then the state is the dict that it knows."""
    both = Both(10)
    asked: dict[str, Any] = {
        "streams": [1, 2], "images": [1, 2], "states": {"stock": 1}, "backends": [],
    }  # fmt: skip

    assert not made(both.declarations, Offer.read(asked, both.declarations))
    assert not made(both.declarations, Offer.read({**asked, "tables": ALL}, both.declarations))
    newer = {**asked, "streams": [1, 2, 3], "images": [1, 2, 3]}
    assert not made(both.declarations, Offer.read(newer, both.declarations))
    assert made(both.declarations, Offer.read({**newer, "tables": ALL}, both.declarations))


def test_a_state_that_must_be_converted_goes_whole() -> None:
    both = Both(10)
    d = both.declared.description
    assert made(both.declarations, offer())
    assert not made(both.declarations, offer(tables=dict.fromkeys(ALL, 2)))
    d.backward[1] = lambda fields: fields
    assert not made(both.declarations, offer(1))
    assert made(both.declarations, offer(2))
    d.backward.clear()
    both.declared.trial = Trial("stock", 1, bytes=1000)
    assert not made(both.declarations, offer())


# What comes is looked at


def refusal(reader: TableReader, memfd: Fd, error: type[Exception] = ImageError) -> str:
    with pytest.raises(error) as caught:
        reader.add(memfd)
    return str(caught.value)


def sealed(*parts: bytes, magic: bytes = table_pieces.MAGIC, version: int = 1, more: int = 0) -> Fd:
    """A memfd as a liar makes it."""
    document = b"".join(parts)
    memfd = Fd(os.memfd_create("liar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    header = image.HEADER.pack(magic, version, zlib.crc32(document), len(document) + more)
    os.write(memfd.fileno(), header + document)
    image.protect(memfd)
    return memfd


def framed(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


HEAD = framed(msgspec.msgpack.encode(Head("stock", "items", 1, describe(Stock).shape.mark)))

LIES: list[tuple[Callable[[], Fd], str]] = [
    (lambda: Fd(os.open("/dev/null", os.O_RDONLY)), "is not a memfd"),
    (lambda: Fd(os.memfd_create("open", os.MFD_ALLOW_SEALING)), "is not sealed"),
    (lambda: sealed(magic=image.MAGIC), "starts with"),
    (lambda: sealed(HEAD, version=2), "format 2 is unknown"),
    (lambda: sealed(HEAD, more=1), "truncated"),
    (sealed, "its head does not decode"),
    (lambda: sealed(framed(b"\xc1")), "its head does not decode"),
    (lambda: sealed(HEAD, b"\0\0"), "ends inside a frame"),
    (lambda: sealed(HEAD, b"\xff\xff\xff\xff"), "claims a frame of"),
    (lambda: sealed(framed(msgspec.msgpack.encode(Head("other", "items", 1, 0)))), "no table here"),
    (lambda: sealed(framed(msgspec.msgpack.encode(Head("stock", "count", 1, 0)))), "no table here"),
    (lambda: sealed(framed(msgspec.msgpack.encode(Head("stock", "items", 0, 0)))), "be converted"),
]


@pytest.mark.parametrize(("make", "why"), LIES, ids=[why for _, why in LIES])
def test_what_is_no_piece_is_refused(make: Callable[[], Fd], why: str) -> None:
    """By the number that it would have."""
    with make() as memfd:
        message = refusal(Both(0).reader, memfd)

    assert why in message
    assert "piece 0 of the tables" in message


@pytest.mark.parametrize(
    "frame", [({1: Item(1)}, []), ({"a": 5}, []), ({}, [1]), {}, ({"a": {"text": "x"}}, [])]
)
def test_keys_and_values_of_another_type_are_refused(frame: object) -> None:
    with sealed(HEAD, framed(msgspec.msgpack.encode(frame))) as memfd:
        assert "does not decode" in refusal(Both(0).reader, memfd, UnreadableState)


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_pieces, "MOST", 1)
    reader = Both(0).reader
    with sealed(HEAD) as memfd:
        reader.add(memfd)
        assert "one too many (limit 1)" in refusal(reader, memfd)


def orders(pieces: Sequence[Piece]) -> list[list[Piece]]:
    first, second = pieces
    return [[], [first], [second, first], [first, second, second]]


@pytest.mark.parametrize("case", range(4))
def test_the_image_says_which_pieces_there_must_be(case: int, both: Both) -> None:
    """All of them, in their order, and none twice."""
    both.rounds.begin()
    both.round()
    both.stock.items["1"] = Item(7)
    saved = both.finish()
    reader = TableReader({"stock": both.declared.description})
    for piece in orders(both.rounds.pieces)[case]:
        reader.add(piece.memfd)
    there, _ = load(Stock, saved)

    with pytest.raises(ImageError, match="not all pieces of table 'items'"):
        reader.fill(saved, there)


# The channel


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


def test_an_empty_table_needs_no_round() -> None:
    both = Both(0)
    both.rounds.begin()
    assert both.rounds.at_end
    assert both.stock == both.loaded(both.finish())
    assert not both.rounds.pieces
    both.rounds.end()


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


def test_a_piece_that_is_full_is_sealed(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has as many pieces as it needs."""
    monkeypatch.setattr("upgrader.instance.rounds.SIZE", 2000)
    monkeypatch.setattr("upgrader.instance.rounds._AT_ONCE", 50)
    both.rounds.begin()
    both.round()
    both.stock.items.update({str(n): Item(-n) for n in range(500)})
    saved = both.finish()

    assert both.stock == both.loaded(saved)
    assert len(both.rounds.pieces) > 5
    assert all(piece.bytes < 200_000 for piece in both.rounds.pieces)


def test_what_is_written_can_be_read() -> None:
    writing = Writing(Head("s", "f", 1, 2))
    writing.add({"a": 1}, ["b"])
    with (
        writing.seal().memfd as memfd,
        table_pieces.opened(memfd, "it") as (head, checksum, frames),
    ):
        assert Head("s", "f", 1, 2) == head
        assert [[{"a": 1}, ["b"]]] == [msgspec.msgpack.decode(frame) for frame in frames]
        assert checksum


def test_the_format_of_a_piece_does_not_change() -> None:
    """A golden one is read, and written the same."""
    data = (STREAMS / f"{PIECE}.bin").read_bytes()
    assert data == piece_bytes()
    with Fd(os.memfd_create("golden", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as memfd:
        os.write(memfd.fileno(), data)
        image.protect(memfd)
        with table_pieces.opened(memfd, "golden") as (head, _, frames):
            found = [msgspec.msgpack.decode(frame) for frame in frames]

    assert (Head("rooms", "users", 1, 7), [[{"a": ["A"]}, []], [{}, ["b", "c"]]]) == (head, found)
