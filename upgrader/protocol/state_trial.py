# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a state can be saved as it stands: names the part that cannot, and measures the rest."""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

_DEPTH = 100  # containers within containers, of which one holds itself
_PIECE = 1000  # items that are encoded at once, about a millisecond's worth
_KEY = 40  # characters of a key that are shown


@dataclass(frozen=True, slots=True)
class Measured:
    """What saving a state takes: bytes, and seconds during which nothing else runs."""

    bytes: int
    seconds: float


def measure(value: object) -> Measured:
    """Encode a state piece by piece, from any thread: the others go on in between.

    Raises whatever msgspec raises for a part that cannot be encoded.
    """
    size, seconds = 0, 0.0
    for piece in _pieces(value):
        began = time.perf_counter()
        size += len(msgspec.msgpack.encode(piece))
        seconds += time.perf_counter() - began
    return Measured(size, seconds)


def blame(value: object) -> str:
    """The path of the part of a value that cannot be encoded, and why; empty if all of it can."""
    path, seen = "", set[int]()
    reason = _refusal(value)
    while reason and id(value) not in seen and len(seen) < _DEPTH:
        seen.add(id(value))
        for step, part in _parts(value):
            if refusal := _refusal(part):
                path, value, reason = path + step, part, refusal
                break
        else:
            break
    return f"{path.removeprefix('.')}: {reason}" if path else reason


def _refusal(value: object) -> str:
    try:
        msgspec.msgpack.encode(value)
    except Exception as error:  # what the author's own classes raise is as good a reason
        return str(error) or type(error).__name__
    return ""


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, each with the step that leads there."""
    match value:
        case dict():
            for key, item in list(value.items()):
                yield "[key]", key
                yield f"[{_key(key)}]", item
        case list() | tuple() | set() | frozenset():
            for place, item in enumerate(value):
                yield f"[{place}]", item
        case _:
            for name in _fields(value):
                if hasattr(value, name):
                    yield f".{name}", getattr(value, name)


def _pieces(value: Any) -> Iterator[object]:
    for name in _fields(value):
        part = getattr(value, name, None)
        if isinstance(part, dict):
            # A copy, made in one step: who owns the state may change it between two pieces.
            yield from map(dict, _batches(list(part.items())))
        elif isinstance(part, (list, tuple, set, frozenset)):
            yield from _batches(list(part))
        else:
            yield part


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    iterator: Iterable[Any] = iter(items)
    while batch := list(itertools.islice(iterator, _PIECE)):
        yield batch


def _fields(value: object) -> Iterable[str]:
    for names in ("__dataclass_fields__", "__struct_fields__"):
        if hasattr(type(value), names):
            return tuple(getattr(value, names))
    return [each.name for each in getattr(type(value), "__attrs_attrs__", ())]


def _key(key: object) -> str:
    if not isinstance(key, (str, bytes, int, float)):
        return type(key).__name__
    text = repr(key)
    return text if len(text) <= _KEY else text[:_KEY] + "..."
