# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a new process says to takeover is understood, and what it may not say is not."""

import json

import pytest

from upgrader.codes import Code
from upgrader.protocol.takeover_line import LIMIT, Said, Word, decode, encode, encode_1

WORDS = [
    Word(Said.PREPARED),
    Word(Said.COMMITTED),
    Word(Said.FAILED, Code.VERIFY_FAILED, "check: ValueError: ä\n\0"),
]


@pytest.mark.parametrize("word", WORDS)
def test_there_and_back(word: Word) -> None:
    assert word == decode(encode(word))


@pytest.mark.parametrize("word", WORDS)
def test_library_0_1_0(word: Word) -> None:
    """It has no codes; and both ways, as either side may be the older one."""
    assert Word(word.said, reason=word.reason) == decode(encode_1(word))


@pytest.mark.parametrize("reason", ["x" * 9000, "\0" * 9000, "ä" * 3000, "\udcff" * 9000])
def test_a_long_reason_is_cut(reason: str) -> None:
    """The word arrives whole."""
    data = encode(Word(Said.FAILED, Code.LOAD_FAILED, reason))

    word = decode(data)

    assert len(data) <= LIMIT
    assert word is not None
    assert (Said.FAILED, Code.LOAD_FAILED) == (word.said, word.code)
    assert len(word.reason) > 400


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"{}", b"[1]", b"\xff", b"commit", b'{"said":1}', b'{"said":["failed"]}',
        b'{"said":"done"}', b"{" * 4000, b'{"a":' * 900,
    ],
)  # fmt: skip
def test_nonsense(data: bytes) -> None:
    assert decode(data) is None


def test_an_unknown_code() -> None:
    """Of a newer library: the word counts, and why is not known."""
    for code in ("no-such-code", 7, None, ["busy"]):
        data = json.dumps({"said": "failed", "code": code, "reason": 7}).encode()
        assert Word(Said.FAILED, Code.UNKNOWN, "") == decode(data)
