# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where messages of WebSocket clients end, however their bytes come."""

import random
from collections.abc import Iterator

import pytest

from upgrader.errors import ImageError
from upgrader.integrations.websocket_frames import CARRIED, Frames
from upgrader.protocol import connection_secrets

TEXT, MORE, CLOSE, PING = 1, 0, 8, 9


def frame(opcode: int, size: int, *, fin: bool = True) -> bytes:
    first = bytes([opcode | (0x80 if fin else 0)])
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 1 << 16:
        length = bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([0x80 | 127]) + size.to_bytes(8, "big")
    return first + length + b"mask" + bytes(size)


#: Frames, and whether a message, or a control frame outside of one, ends with each.
TALK = [
    (frame(TEXT, 5), True),
    (frame(PING, 0), True),
    (frame(TEXT, 200, fin=False), False),
    (frame(PING, 125), False),
    (frame(MORE, 0, fin=False), False),
    (frame(MORE, 70_000), True),
    (frame(TEXT, 0), True),
]


def pieces(data: bytes, seed: int) -> Iterator[bytes]:
    """The same bytes as a network might bring them."""
    chance = random.Random(seed)
    while data:
        size = chance.choice([1, 2, 3, 7, 100, 5000, 80_000])
        yield data[:size]
        data = data[size:]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_unfinished_is_kept(seed: int) -> None:
    """At each point the rest is all since the end of the last message, byte for byte."""
    whole = b"".join(data for data, _ in TALK)
    ends = [0]
    at = 0
    for data, ended in TALK:
        at += len(data)
        ends += [at] if ended else []
    frames, came = Frames(), 0
    for piece in pieces(whole, seed):
        frames.feed(piece)
        came += len(piece)
        last = max(end for end in ends if end <= came)
        assert whole[last:came] == frames.rest
    assert 3 == frames.messages
    assert not frames.closing


def test_a_message_that_is_too_long_to_be_carried() -> None:
    """It has no rest until it ends; what comes after it has."""
    frames = Frames()
    data = frame(TEXT, CARRIED)
    frames.feed(data[:-1])
    assert frames.rest is None
    frames.feed(data[-1:] + b"\x81")
    assert (1, b"\x81") == (frames.messages, frames.rest)


def test_a_close_frame() -> None:
    frames = Frames()
    frames.feed(frame(CLOSE, 2))
    assert frames.closing


def test_secrets_are_read_until_they_are_wiped() -> None:
    secrets = {7: b"cookie", 1 << 40: b""}
    with connection_secrets.write(secrets) as memfd:
        assert secrets == connection_secrets.read(memfd)
        assert secrets == connection_secrets.read(memfd)
        with memfd.duplicate() as held:
            connection_secrets.wipe(memfd)
            assert {} == connection_secrets.read(held)


@pytest.mark.parametrize("lie", [b"x", b"UPGSECR\2\x80", b"UPGSECR\1\x81\x07", b"UPGSECR\1\x93"])
def test_secrets_that_are_none(lie: bytes) -> None:
    """They are refused, and what was in them is not told."""
    with connection_secrets.write({}) as memfd:
        with open(f"/proc/self/fd/{memfd.fileno()}", "wb") as file:
            file.write(lie)
        with pytest.raises(ImageError) as refused:
            connection_secrets.read(memfd)
        assert refused.value.__cause__ is None or "UPG" not in str(refused.value)
