# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of the stream and the rules of their order: no socket in sight."""

import contextlib
import itertools
import random
from collections.abc import Iterator

import msgspec
import pytest

from tests.unit.golden import ALL_FRAMES, STREAMS
from upgrader.codes import Code
from upgrader.errors import ProtocolError
from upgrader.protocol.record_order import TRANSITIONS, Incoming, StreamPhase, batches
from upgrader.protocol.records import (
    HELLO_FDS,
    MAGIC,
    MAX_FDS,
    REASON_SIZE,
    RECORD_SIZE,
    VERSIONS,
    Ack,
    End,
    EndReason,
    Fds,
    Hello,
    Record,
    abort,
    decode,
    encode,
)

# Frames


@pytest.mark.parametrize(
    ("version", "name", "record"), ALL_FRAMES, ids=[name for _, name, _ in ALL_FRAMES]
)
def test_released_frames(version: int, name: str, record: Record) -> None:
    """The committed frames of each version of the stream decode to what they were made of, and
    back."""
    frame = (STREAMS / f"{name}.bin").read_bytes()

    assert record == decode(frame)
    assert frame == encode(record, version)
    assert RECORD_SIZE == len(frame)


def test_the_largest_records_fit() -> None:
    """Every number may have 64 bits, and an Abort its longest reason beside any code."""
    most = 2**64 - 1
    ends = [End(most, reason) for reason in EndReason]
    aborts = [abort(code, "\N{EURO SIGN}" * REASON_SIZE) for code in Code]
    for record in (Hello(most, most), Fds(most, most), Ack(most, most), *ends, *aborts):
        assert record == decode(encode(record, VERSIONS[-1]))
    assert all(len(item.reason.encode()) > REASON_SIZE - 3 for item in aborts)


def frame(
    magic: bytes = MAGIC, version: int = VERSIONS[-1], length: int | None = None, body: bytes = b""
) -> bytes:
    size = len(body) if length is None else length
    head = magic + version.to_bytes(2, "big") + size.to_bytes(2, "big")
    return (head + body).ljust(RECORD_SIZE, b"\0")


def packed(**fields: object) -> bytes:
    return frame(body=msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "0 bytes instead of 192"),
        (frame()[:-1], "191 bytes instead of 192"),
        (frame() + b"\0", "193 bytes instead of 192"),
        (frame(magic=b"HTTP"), "starts with b'HTTP'"),
        (frame(version=4), r"version 4, this library speaks \(1, 2, 3\)"),
        (frame(version=0), r"version 0, this library speaks \(1, 2, 3\)"),
        (frame(length=185), "claims 185 bytes"),
        (frame(length=65535), "claims 65535 bytes"),
        (frame(), "does not decode"),
        (frame(body=b"\xc1"), "does not decode"),
        (frame(body=b"\x81\xa4type\xa1\xff"), "does not decode"),
        (packed(type="farewell"), "'farewell'"),
        (packed(generation=1, fds=1), "`type`"),
        (packed(type="hello", generation=1), "`fds`"),
        (packed(type="hello", generation="1", fds=1), r"\$.generation"),
        (packed(type="end", sent=1, reason="tired"), "'tired'"),
    ],
)  # fmt: skip
def test_bad_frames(bad: bytes, message: str) -> None:
    """The message says what is wrong with it."""
    with pytest.raises(ProtocolError, match=message):
        decode(bad)


def test_random_frames_raise_nothing_else() -> None:
    """Whatever the bytes are: ProtocolError, or a record."""
    source = random.Random(2)
    good = [encode(record, version) for version, _, record in ALL_FRAMES]
    for _ in range(20_000):
        damaged = bytearray(source.choice(good))
        for _ in range(source.randint(1, 5)):
            damaged[source.randrange(64)] = source.randrange(256)
        with contextlib.suppress(ProtocolError):
            assert isinstance(decode(bytes(damaged)), Record)


# Order

RECORDS: list[tuple[Record, int]] = [
    (Hello(1, 2), HELLO_FDS),
    (Fds(0, 2), 2),
    (End(2, EndReason.COMPLETE), 0),
]


def at(phase: StreamPhase) -> Incoming:
    """A stream of 2 FDs that has come so far."""
    incoming = Incoming()
    steps = {StreamPhase.SETUP: 0, StreamPhase.ACTIVE: 2, StreamPhase.COMPLETED: 3}[phase]
    for record, fds in RECORDS[:steps]:
        incoming.receive(record, fds)
    assert phase is incoming.phase
    return incoming


@pytest.mark.parametrize(
    ("phase", "item"),
    list(itertools.product(StreamPhase, RECORDS)),
    ids=lambda v: str(v).split("(")[0],
)
def test_every_step_is_in_the_table_or_refused(
    phase: StreamPhase, item: tuple[Record, int]
) -> None:
    """A record that the table does not have in this phase is named, and changes nothing."""
    record, fds = item
    incoming = at(phase)
    if (phase, type(record)) in TRANSITIONS:
        if isinstance(record, Fds):  # `at` has received all there are
            incoming = Incoming()
            incoming.receive(*RECORDS[0])
        incoming.receive(record, fds)

        assert TRANSITIONS[phase, type(record)] is incoming.phase
    else:
        with pytest.raises(
            ProtocolError, match=f"{type(record).__name__}: unexpected in phase {phase}"
        ):
            incoming.receive(record, fds)
        assert phase is incoming.phase


def test_the_table_is_complete() -> None:
    """It says something of every phase and record, and every phase but the last goes on."""
    assert {phase for phase, _ in TRANSITIONS} == {StreamPhase.SETUP, StreamPhase.ACTIVE}
    assert {record for _, record in TRANSITIONS} == {Hello, Fds, End}


@pytest.mark.parametrize("fds", [0, 1, MAX_FDS - 1, MAX_FDS, MAX_FDS + 1, 5000])
def test_batches_are_received(fds: int) -> None:
    """What the source's batches say is what the destination expects."""
    incoming = Incoming()
    incoming.receive(Hello(7, fds), HELLO_FDS)
    for batch in batches(fds):
        incoming.receive(batch, batch.count)
    incoming.receive(End(fds, EndReason.COMPLETE), 0)

    assert (fds, 7) == (incoming.received, incoming.hello.generation)
    assert StreamPhase.COMPLETED is incoming.phase


def sequences() -> Iterator[tuple[str, list[tuple[Record, int]], str]]:
    hello = (Hello(1, 300), HELLO_FDS)
    first = (Fds(0, 253), 253)
    yield "too few FDs with Hello", [(Hello(1, 0), 1)], "Hello: came with 1 FDs instead of 2"
    yield "too many FDs with Hello", [(Hello(1, 0), 3)], "Hello: came with 3 FDs instead of 2"
    yield "no generation", [(Hello(0, 0), 2)], "Hello: .*generation=0"
    yield "negative FDs", [(Hello(1, -1), 2)], "Hello: .*fds=-1"
    yield "too few", [hello, (Fds(0, 253), 252)], "FDs 0 to 252: came with 252 FDs instead of 253"
    yield "too many", [hello, (Fds(0, 47), 48)], "FDs 0 to 46: came with 48 FDs instead of 47"
    yield "more than announced", [hello, first, (Fds(253, 48), 48)], "too many: 300 were announced"
    yield "more than fit", [hello, (Fds(0, 254), 254)], "FDs 0 to 253: "
    yield "overlap", [hello, first, (Fds(252, 48), 48)], "FDs 252 to 299: .*start at 253"
    yield "a gap", [hello, first, (Fds(254, 46), 46)], "FDs 254 to 299: .*start at 253"
    yield "twice", [hello, first, first], "FDs 0 to 252: .*start at 253"
    yield "none", [hello, (Fds(0, 0), 0)], "FDs 0 to -1: "
    yield "negative", [hello, (Fds(0, -1), 0)], "FDs 0 to -2: "
    yield "below", [hello, (Fds(-1, 1), 1)], "FDs -1 to -1: "
    yield (
        "End with FDs",
        [(Hello(1, 0), 2), (End(0, EndReason.COMPLETE), 1)],
        "End: came with 1 FDs",
    )
    yield "short, complete", [hello, first, (End(253, EndReason.COMPLETE), 0)], "End: .*of 300"
    yield "whole, cut", [(Hello(1, 0), 2), (End(0, EndReason.CHANNEL_FULL), 0)], "End: .*of 0"
    yield "End too high", [hello, first, (End(254, EndReason.CHANNEL_FULL), 0)], "End: .*253 came"
    yield "End too low", [hello, first, (End(252, EndReason.CHANNEL_FULL), 0)], "End: .*253 came"


@pytest.mark.parametrize(
    ("records", "message"), [pytest.param(r, m, id=i) for i, r, m in sequences()]
)
def test_wrong_sequences(records: list[tuple[Record, int]], message: str) -> None:
    """The last record of each is refused by name, and changes nothing."""
    incoming = Incoming()
    for record, fds in records[:-1]:
        incoming.receive(record, fds)
    before = incoming.phase, incoming.received, incoming.hello
    with pytest.raises(ProtocolError, match=message):
        incoming.receive(*records[-1])

    assert before == (incoming.phase, incoming.received, incoming.hello)


def test_a_cut_list_is_legal() -> None:
    """What did not fit is missing, and the End says so."""
    for reason in (EndReason.CHANNEL_FULL, EndReason.TOO_MANY_IN_FLIGHT):
        incoming = Incoming()
        incoming.receive(Hello(1, 300), HELLO_FDS)
        incoming.receive(Fds(0, 253), 253)
        incoming.receive(End(253, reason), 0)

        assert StreamPhase.COMPLETED is incoming.phase
