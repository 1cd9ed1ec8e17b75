# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read D-Bus values by their signature; does no IO.

https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-marshaling
"""

from __future__ import annotations

import functools
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FIXED = {
    signature: struct.Struct(f"<{layout}")
    for signature, layout in {
        "y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d",
    }.items()
}  # fmt: skip


def read(signature: str, body: bytes, at: int = 0) -> list[Any]:
    """All values of a little-endian body from `at` on; raises ValueError if it makes no sense."""
    reader = _Reader(body, at)
    try:
        return [reader.value(part) for part in split(signature)]
    except (struct.error, IndexError, RecursionError) as error:
        raise ValueError(f"body does not match {signature!r}") from error


@functools.lru_cache(256)
def split(signature: str) -> tuple[str, ...]:
    """The complete types of a signature."""
    parts, at = [], 0
    while at < len(signature):
        end = _end(signature, at)
        parts.append(signature[at:end])
        at = end
    return tuple(parts)


def _end(signature: str, at: int) -> int:
    match signature[at]:
        case "a":
            return _end(signature, at + 1)
        case "(" | "{":
            at += 1
            while signature[at] not in ")}":
                at = _end(signature, at)
            return at + 1
        case _:
            return at + 1


class _Reader:
    def __init__(self, body: bytes, at: int) -> None:
        self._body = body
        self._at = at

    def value(self, signature: str) -> Any:
        kind = signature[0]
        if layout := _FIXED.get(kind):
            (number,) = layout.unpack_from(self._body, self._skip(layout.size, layout.size))
            return bool(number) if kind == "b" else number
        match kind:
            case "s" | "o":
                return self._text(self._length())
            case "g":
                return self._text(self._body[self._skip(1, 1)])
            case "v":
                return self.value(self._text(self._body[self._skip(1, 1)]))
            case "a":
                return self._array(signature[1:])
            case "(" | "{":
                self._skip(8, 0)
                return tuple(self.value(part) for part in split(signature[1:-1]))
        raise ValueError(f"unknown type {signature!r}")

    def _array(self, element: str) -> list[Any]:
        size = self._length()
        self._skip(8 if element[0] in "({xtd" else 1, 0)
        end = self._at + size
        values = []
        while (before := self._at) < end:
            values.append(self.value(element))
            if self._at == before:
                raise ValueError(f"{element!r} takes no bytes, and its array has some")
        return values

    def _length(self) -> int:
        (length,) = _FIXED["u"].unpack_from(self._body, self._skip(4, 4))
        return int(length)

    def _text(self, length: int) -> str:
        at = self._skip(1, length + 1)
        return self._body[at : at + length].decode()

    def _skip(self, alignment: int, size: int) -> int:
        """Align, then move past `size` bytes; returns where they begin."""
        at = self._at + -self._at % alignment
        if at + size > len(self._body):
            raise ValueError("value runs past the end")
        self._at = at + size
        return at
