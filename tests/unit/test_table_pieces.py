# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pieces of tables: nothing that comes is trusted, and their format stays."""

import os
import struct
import zlib
from collections.abc import Callable

import msgspec
import pytest

from tests.unit.copied import Both, Item, Stock
from tests.unit.golden import PIECE, STREAMS, piece_bytes
from upgrader.errors import ImageError, UnreadableState
from upgrader.protocol import image, table_pieces
from upgrader.protocol.fd import Fd
from upgrader.protocol.state import describe
from upgrader.protocol.table_pieces import Head, Writing
from upgrader.protocol.table_reader import TableReader


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
