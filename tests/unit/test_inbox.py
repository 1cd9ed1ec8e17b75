# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cutting received bytes into messages: whole ones leave, the rest stays."""

import time

import pytest

from upgrader.errors import DeclarationError
from upgrader.instance.inbox import Inbox, MessageTooLong


def length_first(buffer: bytearray) -> int | None:
    """A frame: one byte says how long the rest is."""
    return 1 + buffer[0]


def test_messages_by_separator() -> None:
    """They come with it, in order; what is incomplete stays."""
    inbox = Inbox(b"a\nbc\n\nd")

    assert [b"a\n", b"bc\n", b"\n", None] == [inbox.take_message(b"\n", 10) for _ in range(4)]
    assert b"d" == inbox.buffer


def test_byte_by_byte() -> None:
    """However the bytes come, the messages are the same; also with a longer separator."""
    inbox, found = Inbox(), []
    for byte in b"one\r\n\r\ntwo\r\r\n\r\n\r\n\r\n":
        inbox.buffer.append(byte)
        if message := inbox.take_message(b"\r\n\r\n", 100):
            found.append(message)

    assert [b"one\r\n\r\n", b"two\r\r\n\r\n", b"\r\n\r\n"] == found


def test_another_separator_sees_all() -> None:
    """What one separator has scanned in vain is scanned anew for another."""
    inbox = Inbox(b"a\nb")

    assert inbox.take_message(b"\n\n", 10) is None
    assert b"a\n" == inbox.take_message(b"\n", 10)


def test_messages_by_function() -> None:
    """It says how long the first message is, also before it is all there."""
    inbox = Inbox(b"\x03abc\x02d")

    assert b"\x03abc" == inbox.take_message(length_first, 10)
    assert inbox.take_message(length_first, 10) is None
    assert b"\x02d" == inbox.buffer


def test_too_long_messages() -> None:
    """They are refused as soon as that is known, and nothing is taken."""
    for data, frame in [(b"12345", b"\n"), (b"1234\n", b"\n"), (b"\x09", length_first)]:
        inbox = Inbox(data)
        with pytest.raises(MessageTooLong, match="longer than 4 bytes") as caught:
            inbox.take_message(frame, 4)
        assert (4, data) == (caught.value.limit, bytes(inbox.buffer))
    assert b"123\n" == Inbox(b"123\n").take_message(b"\n", 4)


@pytest.mark.parametrize("frame", [b"", lambda buffer: 0, lambda buffer: -1])
def test_empty_messages_are_refused(frame: bytes) -> None:
    """They would come for ever, and the loop would never turn."""
    inbox = Inbox(b"abc")
    with pytest.raises(DeclarationError, match="frame: gives a message of"):
        inbox.take_message(frame, 10)
    assert b"abc" == inbox.buffer


def test_slow_senders_cost_linear_time() -> None:
    """Looking for a separator begins where the last look ended."""
    inbox = Inbox()
    begin = time.process_time()
    for _ in range(100_000):
        inbox.buffer += bytes(50)
        assert inbox.take_message(b"\n", 1 << 30) is None

    assert time.process_time() - begin < 10  # quadratic would be some 250 GB to look at
