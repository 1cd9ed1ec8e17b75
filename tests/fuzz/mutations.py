# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes to bytes and to values, as somebody who means harm would make them; decodes nothing."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

EVIL = "\x1b]0;x\x07\r\nweb.service\t\x9b2J\u202e\u2028\x00"
TEXTS = [
    "",
    "\0",
    EVIL,
    "²",
    "٣",
    "9" * 400,
    "9" * 5000,
    "-1",
    "nan",
    "1e999",
    "x" * 5000,
    "/../..",
    "=",
    ":",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    255,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    -1e300,
]
OTHERS: list[Any] = [None, True, [], {}, [[]], {"": {}}, float("inf"), float("nan"), "\ud800"]
PIECES = [
    b"\0", b"\xff" * 8, b"\0" * 64, b"\xed\xa0\x80", b"[" * 2000, b'{"a":' * 500, b"\x91" * 2000,
    b"\n", b"\r\n", b"=", b"9" * 400, "²".encode(), b"NaN", b"1e999", b'"', b"\\ud800", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x03a()\0", b"\x02aa\0",
]  # fmt: skip
_DEEPEST = 300


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, double, replace or insert something; also what may be a length."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64)))
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                changed[at:at] = rng.choice(PIECES)
            case 4:
                changed[at : at + size] = rng.choice(PIECES)
            case _:
                number = rng.choice((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                changed[at : at + size] = number.to_bytes(8, rng.choice(("big", "little")))[:size]
    return bytes(changed)


def change_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Replace a part of a value, or the whole, by one that nobody expects."""
    if (depth and rng.random() < 0.3) or not isinstance(value, dict | list) or not value:
        return _another(rng, value)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(5):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(TEXTS)] = changed[key]
            case _:
                changed[key] = change_value(rng, value[key], depth + 1)
        return changed
    items = list(value)
    at = rng.randrange(len(items))
    match rng.randrange(5):
        case 0:
            del items[at]
        case 1:
            single = not isinstance(items[at], dict | list)  # else it would grow without end
            items[at:at] = [items[at]] * rng.choice((1, 2, 300 if single else 3))
        case _:
            items[at] = change_value(rng, items[at], depth + 1)
    return items


def _another(rng: random.Random, value: Any) -> Any:
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(TEXTS) + value[at:]
    if rng.random() < 0.05:
        for _ in range(rng.choice((20, _DEEPEST))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def _changed_as(
    decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]
) -> Callable[[random.Random, bytes], bytes]:
    """The structure of a format is changed two times of three, and its bytes otherwise."""

    def change(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.33:
            return change_bytes(rng, data)
        try:
            value = decode(data)
            for _ in range(rng.choice((1, 1, 2, 4))):
                value = change_value(rng, value)
            return encode(value)
        except (ValueError, OverflowError, RecursionError, TypeError, msgspec.MsgspecError):
            return change_bytes(rng, data)

    return change


change_json = _changed_as(json.loads, lambda value: json.dumps(value).encode())
change_msgpack = _changed_as(msgspec.msgpack.decode, msgspec.msgpack.encode)
change_text = _changed_as(
    lambda data: data.decode().split(" "),
    lambda words: " ".join(str(each) for each in words).encode(errors="surrogatepass"),
)
