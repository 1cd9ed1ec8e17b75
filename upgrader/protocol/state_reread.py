# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a state that can be saved would come back as it is: what its own class could not load, and
what would be something else, or gone. msgspec encodes whatever a field holds, whatever it is annotated as."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from upgrader.protocol.table import Table

if TYPE_CHECKING:
    from upgrader.protocol.state import StateVersions

_LOOKED_AT = 1000  # items, of all containers together
_DEPTH = 5  # containers within containers
_NAMED = 5
_KEY = 40  # characters of a key that are shown


@dataclass(frozen=True, slots=True)
class Reread:
    """Why a state cannot be loaded, or nothing; and what comes back otherwise, for people."""

    refusal: str = ""
    altered: tuple[str, ...] = ()


def reread(value: Any, description: "StateVersions") -> Reread:
    """Save and load a state, from any thread; raises whatever msgspec raises if it cannot be saved."""
    data = msgspec.msgpack.encode(value)
    try:
        loaded: Any = msgspec.msgpack.decode(data, type=description.cls)
        dropped = description.shape.compare(data).unknown
    except Exception as error:  # __post_init__ raises what it likes
        name = "" if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: "
        return Reread(f"{name}{error}")
    found = itertools.chain(
        (f"{path} is in no type that is annotated there, and is dropped" for path in dropped),
        (f"{name} is no field, and is dropped" for name in _beside(value, loaded)),
        (
            f"{path} is a {type(one).__name__}, and is loaded as a {type(other).__name__}"
            for path, one, other in itertools.islice(_pairs("", value, loaded, 0), _LOOKED_AT)
            if not _alike(one, other)
        ),
    )
    return Reread(altered=tuple(itertools.islice(found, _NAMED)))


def _alike(one: object, other: object) -> bool:
    return (
        type(one) is type(other)
        or isinstance(one, Table)  # made anew from the dict that is saved
        or (type(one) is int and type(other) is float)
        or (type(one) is bytearray and type(other) is bytes)
    )


def _beside(value: object, loaded: object) -> list[str]:
    """Attributes that are no fields, and that nothing makes anew."""
    names = getattr(value, "__dict__", {}).keys() - getattr(loaded, "__dict__", {}).keys()
    made = (
        name
        for cls in type(value).__mro__
        for name, each in vars(cls).items()
        if isinstance(each, functools.cached_property)
    )
    return sorted(name for name in names.difference(made) if not name.startswith("_"))


def _pairs(path: str, one: Any, other: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
    """What lies in the same place of two values; what is not the same there may have changed since."""
    if depth > _DEPTH:
        return
    steps: Iterator[tuple[str, Any, Any]]
    if isinstance(one, dict) and isinstance(other, dict):
        steps = ((f"[{_key(k)}]", v, other[k]) for k, v in list(one.items()) if k in other)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        both = zip(list(one), other, strict=False)
        steps = ((f"[{place}]", *pair) for place, pair in enumerate(both))
    else:
        names = getattr(type(one), "__dataclass_fields__", ()) if type(one) is type(other) else ()
        steps = (
            (f".{name}", getattr(one, name), getattr(other, name))
            for name in names
            if hasattr(one, name) and hasattr(other, name)
        )
    for step, here, there in steps:
        way = (path + step).removeprefix(".")
        yield way, here, there
        yield from _pairs(way, here, there, depth + 1)


def _key(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _KEY else text[:_KEY] + "..."
