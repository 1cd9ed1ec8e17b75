# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed, versioned application state; knows nothing of FDs, channels or systemd.

The version rules are those of QEMU's VMStateDescription, with one turned around: the *image*
says from which version on it can be read, because old code cannot know newer code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import msgspec

from upgrader.errors import DeclarationError, IncompatibleState, Retired, UnreadableState

T = TypeVar("T")
Converter = Callable[[dict[str, Any]], dict[str, Any]]

_SINCE = "upgrader.since"


class SavedState(msgspec.Struct, frozen=True):
    """One state as it travels in an image: `data` is a msgpack map of the fields."""

    name: str
    version: int
    readable_from: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What `@state` declares about a class; `converters` is keyed by the version converted from."""

    name: str
    version: int
    readable_from: int
    since: Mapping[str, int]
    fields: frozenset[str]
    converters: dict[int, Converter]
    retired: dict[int, object]  # by id: read-only, as another instance owns them


def since(version: int, *, default: Any = msgspec.UNSET, default_factory: Any = None) -> Any:
    """A field that exists from `version` of its state on; an older image leaves it at its default."""
    metadata = {_SINCE: version}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    if default is msgspec.UNSET:
        raise DeclarationError("since()", "needs a default: an older image has no such field")
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(field_specifiers=(since, dataclasses.field))
def state(
    name: str, *, version: int = 1, readable_from: int | None = None
) -> Callable[[type[T]], type[T]]:
    """Declare a class as application state called `name`; it becomes a dataclass.

    `readable_from` is the oldest version of the program that can read what this one saves (fields
    it does not know are dropped there, and reported). It defaults to `version`: no downgrade.

    Raises DeclarationError for a version that makes no sense.
    """
    oldest = version if readable_from is None else readable_from
    if version < 1 or not 1 <= oldest <= version:
        raise DeclarationError(f"state {name!r}", f"version={version}, readable_from={oldest}")

    def declare(cls: type[T]) -> type[T]:
        made: type = dataclasses.dataclass(cls)
        fields = dataclasses.fields(made)
        versions = {f.name: f.metadata[_SINCE] for f in fields if _SINCE in f.metadata}
        for field, first in versions.items():
            if first > version:
                raise DeclarationError(f"state {name!r}", f"{field} is since {first} > {version}")
        names = frozenset(field.name for field in fields)
        description = Description(name, version, oldest, versions, names, {}, {})
        made.__upgrader__ = description  # type: ignore[attr-defined]
        return made

    return declare


def describe(cls: type) -> Description:
    """The declaration of a state class; raises DeclarationError for any other class."""
    description = vars(cls).get("__upgrader__")
    if not isinstance(description, Description):
        raise DeclarationError(cls.__qualname__, "is not a state", remedy="add @upgrader.state")
    return description


def convert(cls: type, from_version: int) -> Callable[[Converter], Converter]:
    """Register a function that turns the fields of `from_version` into those of the next version.

    For renamed and retyped fields; new fields with a default need only `since`.
    """
    description = describe(cls)
    if not 1 <= from_version < description.version:
        raise DeclarationError(f"state {description.name!r}", f"cannot convert {from_version}")

    def register(function: Converter) -> Converter:
        description.converters[from_version] = function
        return function

    return register


def save(value: object) -> SavedState:
    """Encode a state; raises UnreadableState for a field that msgspec cannot encode."""
    d = describe(type(value))
    try:
        data = msgspec.msgpack.encode(value)
    except Exception as error:
        raise UnreadableState(f"state {d.name!r}", f"cannot be saved: {error}") from error
    return SavedState(d.name, d.version, d.readable_from, data)


def encode(value: object | None) -> bytes:
    """The fields of a state; nothing for None. Raises UnreadableState like `save`."""
    return b"" if value is None else save(value).data


def header(cls: type) -> SavedState:
    """Name and versions of a state class, without data."""
    d = describe(cls)
    return SavedState(d.name, d.version, d.readable_from, b"")


def load(cls: type[T], saved: SavedState) -> tuple[T, tuple[str, ...]]:
    """Decode a saved state into `cls`; also returns the names of fields that `cls` does not know.

    Raises IncompatibleState where the versions cannot meet, UnreadableState where it is another
    state, or the fields do not decode.
    """
    d = describe(cls)
    item = f"state {d.name!r}"
    if saved.name != d.name:
        raise UnreadableState(item, f"the image has state {saved.name!r} in its place")
    if saved.version > d.version and saved.readable_from > d.version:
        raise IncompatibleState(
            d.name, offered=saved.version, readable_from=saved.readable_from, own=d.version
        )
    data = saved.data
    try:
        if saved.version != d.version:
            data = _to_version(d, saved)
        value = msgspec.msgpack.decode(data, type=cls)
        unknown = msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw]).keys() - d.fields
    except Exception as error:  # the author's converters and __post_init__ raise what they like
        name = "" if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: "
        why = f"version {saved.version} does not decode: {name}{error}"
        raise UnreadableState(item, why) from error
    return value, tuple(sorted(unknown))


def retire(value: object) -> None:
    """Make a state read-only: setting a field raises Retired from now on."""
    cls = type(value)
    retired = describe(cls).retired
    if not retired:  # only now: a method in Python makes every write ten times slower
        cls.__setattr__ = _refusing(cls.__setattr__, retired)  # type: ignore[method-assign]
    retired[id(value)] = value


def _to_version(d: Description, saved: SavedState) -> bytes:
    """The fields of a saved state after all converters that lie in between."""
    versions = range(saved.version, d.version)
    converters = [d.converters[version] for version in versions if version in d.converters]
    if not converters:
        return saved.data
    fields = msgspec.msgpack.decode(saved.data, type=dict[str, Any])
    for converter in converters:
        fields = converter(fields)
    # Back to bytes: only msgpack's own decoder turns each of them into what the class declares.
    return msgspec.msgpack.encode(fields)


def _refusing(
    write: Callable[[Any, str, Any], None], retired: Mapping[int, object]
) -> Callable[[Any, str, Any], None]:
    """`__setattr__` of a state class as it was, but for objects that are retired."""

    def __setattr__(self: object, name: str, value: object) -> None:  # noqa: N807
        if retired and id(self) in retired:
            raise Retired(f"{type(self).__name__}.{name}")
        write(self, name, value)

    return __setattr__
