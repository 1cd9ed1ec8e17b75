# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink as every instance speaks it: messages and errors; does no IO.

JSON objects, each ended by a NUL byte: https://varlink.org/Method-Call. asyncvarlink is a library
for it, but needs an asyncio loop, which a blocking service does not have.
"""

from __future__ import annotations

import json

from upgrader.codes import Code
from upgrader.errors import UpgradeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

INTERFACE = "io.upgrader.Instance"
SERVICE = "org.varlink.service"
#: Longest message taken, in bytes, and how many objects and arrays may be inside each other in it.
LIMIT = 1 << 20
DEPTH = 16
#: Largest number taken (RFC 7493, 2.2); as seconds, a time that every function of the clock takes.
LARGEST = 1 << 53


class VarlinkError(UpgradeError):
    """A method call was answered with an error; `name` is its last part, such as `Busy`."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        words = [str(value) for key, value in parameters.items() if key != "code"]
        details = ", ".join(words)
        super().__init__(f"{name}: {details}" if details else name)
        self.name = name
        self.parameters = parameters


def invalid(parameter: str) -> VarlinkError:
    """The error for a parameter that is missing, unknown or wrong."""
    return VarlinkError(f"{SERVICE}.InvalidParameter", {"parameter": parameter})


def refused(why: str, code: Code = Code.REFUSED) -> VarlinkError:
    """The error for whatever does not fit, or is not possible now."""
    return VarlinkError(f"{INTERFACE}.Refused", {"why": why, "code": code})


def denied() -> VarlinkError:
    """The error for a caller who may not do this."""
    return VarlinkError(f"{SERVICE}.PermissionDenied", {})


def take(buffer: bytearray) -> bytes | None:
    """The first whole message, without its NUL, or None; raises ValueError for one too long."""
    end = buffer.find(b"\0")
    if end < 0:
        if len(buffer) > LIMIT:
            raise ValueError(f"message longer than {LIMIT} bytes")
        return None
    message = bytes(buffer[:end])
    del buffer[: end + 1]
    return message


def decode(message: bytes) -> dict[str, Any]:
    """The object that a message of either side is; raises ValueError for any other bytes.

    It is I-JSON (RFC 7493): UTF-8, without halves of characters, NaN, infinities or numbers above
    LARGEST. What is nested deeper than DEPTH is refused, so that nothing that walks it can fail.
    """
    try:
        found = json.loads(
            message.decode(), parse_int=_whole, parse_float=_real, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    level: list[Any] = [found]
    for _ in range(DEPTH):
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [part for each in parts for part in each if isinstance(part, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {DEPTH}")
    if b"\\u" in message:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _whole(digits: str) -> int:
    if len(digits) > len(str(-LARGEST)):
        raise ValueError("a number is too large")
    return int(_within(int(digits)))


def _real(digits: str) -> float:
    return _within(float(digits))


def _within(number: float) -> float:
    if not -LARGEST <= number <= LARGEST:
        raise ValueError("a number is too large")
    return number


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number")
