# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declare classes as typed, versioned application state.

The version rules are those of QEMU's VMStateDescription, with one turned around: the *image*
says from which version on it can be read, because old code cannot know newer code. For a version
that has other fields the newer one makes those, too (`convert_back`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from upgrader.errors import (
    DeclarationError,
    IncompatibleState,
    Retired,
)
from upgrader.protocol.kinds import SINCE
from upgrader.protocol.later import later
from upgrader.protocol.values import Value

if TYPE_CHECKING:
    import msgspec

    from upgrader.protocol import state_shape, table
else:
    msgspec = later("msgspec", loading=True)
    state_shape = later("upgrader.protocol.state_shape", loading=True)
    table = later("upgrader.protocol.table", loading=True)

T = TypeVar("T")
Converter = Callable[[dict[str, Any]], dict[str, Any]]

_PLAIN = (int, float, str, bytes, bool)


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


_UNSET = _Unset()


class StateVersions(Value):
    """What `@state` declares about a class. `converters` is keyed by the version converted from,
    `backward` by the version converted to."""

    cls: type
    name: str
    version: int
    readable_from: int
    converters: dict[int, Converter]
    backward: dict[int, Converter]
    retired: dict[int, object]  # by id: read-only, as another instance owns them

    @property
    def item(self) -> str:
        """What messages call it."""
        return f"state {self.name!r}"

    @functools.cached_property
    def shape(self) -> state_shape.Shape:
        """Its fields at every depth; raises DeclarationError, and NameError as long as a class that
        an annotation names is not defined."""
        return state_shape.Shape(self.cls, self.item)

    @functools.cached_property
    def decode(self) -> Callable[[bytes], Any]:
        """Decode the fields of this version, with tables as far as `table.unfinished`; raises as msgspec
        does, and whatever the author's `__post_init__` raises."""
        return msgspec.msgpack.Decoder(
            table.unfinished(self.cls) if self.tables else self.cls
        ).decode

    def prepare(self) -> None:
        """Make beforehand what the first `load` would make while clients wait."""
        with contextlib.suppress(Exception):  # `load` says what is wrong
            self.shape.mark  # noqa: B018
            self.tables  # noqa: B018
            self.decode  # noqa: B018

    @functools.cached_property
    def tables(self) -> tuple[str, ...]:
        """The fields that are a `Table`. Raises as `shape` for a field that can never be saved. If all
        fields are plain, that costs a start nothing."""
        try:
            hints = get_type_hints(self.cls, include_extras=True)
        except TypeError:  # what stands there is no type: in `shape`, it gets a message
            hints = {"": None}
        return () if all(map(_is_plain, hints.values())) else self.shape.tables

    def check_readable(self, version: int, readable_from: int) -> None:
        """Raise IncompatibleState unless this program can read what `version` has saved."""
        check_readable(self.name, version, readable_from, own=self.version)


def check_readable(
    name: str, version: int, readable_from: int, *, own: int, what: str = "state"
) -> None:
    """Raise IncompatibleState if what `version` has saved is newer than version `own`, and not
    readable by it. `what` it is that has this name."""
    if version > own and readable_from > own:
        raise IncompatibleState(
            name, offered=version, readable_from=readable_from, own=own, what=what
        )


def since(version: int, *, default: Any = _UNSET, default_factory: Any = None) -> Any:
    """A field that exists from `version` of its state on: what an older version has saved leaves it
    at its default. A missing field of any other kind refuses the state.

    In a dataclass within a state, `version` is one of the state.
    """
    metadata = {SINCE: version}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    if default is _UNSET:
        raise DeclarationError("since()", "needs a default: an older image has no such field")
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(field_specifiers=(since, dataclasses.field))
def state(
    name: str, *, version: int = 1, readable_from: int | None = None
) -> Callable[[type[T]], type[T]]:
    """Declare a class as application state called `name`; it becomes a dataclass.

    `readable_from` is the oldest version of the program that can read what this one saves (fields
    it does not know are dropped there, and reported). It defaults to `version`: no downgrade.

    Raises DeclarationError for a version that makes no sense, and for a field, at whatever depth,
    of a type that can never be saved and loaded: a queue, a task, a lock, a socket, a function.
    """
    if not isinstance(name, str):
        raise DeclarationError("@state", "wants a name", remedy='write @upgrader.state("room")')
    oldest = version if readable_from is None else readable_from
    if version < 1 or not 1 <= oldest <= version:
        raise DeclarationError(f"state {name!r}", f"version={version}, readable_from={oldest}")

    def declare(cls: type[T]) -> type[T]:
        # Made twice, one would lose its default factories.
        made: type = cls if "__dataclass_fields__" in vars(cls) else dataclasses.dataclass(cls)
        for field in dataclasses.fields(made):
            if (first := field.metadata.get(SINCE, version)) > version:
                what = f"{field.name} is since {first} > {version}"
                raise DeclarationError(f"state {name!r}", what)
        description = StateVersions(made, name, version, oldest, {}, {}, {})
        with contextlib.suppress(NameError):  # defined further down: `Declared` asks again
            description.tables  # noqa: B018
        made.__upgrader__ = description  # type: ignore[attr-defined]
        return made

    return declare


def _is_plain(kind: object) -> bool:
    """Whether whatever is of this type can be saved: numbers, text, and containers of them."""
    items = get_args(kind)
    if get_origin(kind) is dict:
        return items[0] in (str, int) and _is_plain(items[1])
    return kind in _PLAIN or (get_origin(kind) is list and _is_plain(items[0]))


def describe(cls: type) -> StateVersions:
    """The declaration of a state class; raises DeclarationError for any other class."""
    description = vars(cls).get("__upgrader__")
    if not isinstance(description, StateVersions):
        raise DeclarationError(cls.__qualname__, "is not a state", remedy="add @upgrader.state")
    return description


def convert(cls: type, from_version: int) -> Callable[[Converter], Converter]:
    """Register a function that turns the fields of `from_version` into those of the next version.

    For renamed and retyped fields; new fields with a default need only `since`.
    """
    description = describe(cls)
    if not 1 <= from_version < description.version:
        raise DeclarationError(description.item, f"cannot convert {from_version}")

    def register(function: Converter) -> Converter:
        description.converters[from_version] = function
        return function

    return register


def convert_back(cls: type, to_version: int) -> Callable[[Converter], Converter]:
    """Register a function that turns the fields of the version after `to_version` into those of
    `to_version`, for a downgrade: the older program cannot know what has been renamed since.

    It runs in the newer program: in a live migration for a destination that needs it, in a restart
    at each park, because nobody knows then which version comes next.
    """
    description = describe(cls)
    if not 1 <= to_version < description.version:
        raise DeclarationError(description.item, f"cannot convert back to {to_version}")
    if to_version < description.readable_from:
        raise DeclarationError(
            description.item,
            f"version {to_version} does not read it: readable_from={description.readable_from}",
            remedy=f"declare it with readable_from={to_version}",
        )

    def register(function: Converter) -> Converter:
        description.backward[to_version] = function
        return function

    return register


def retire(value: object) -> None:
    """Make a state read-only: setting a field, or a key of a table in it, raises Retired from now on."""
    cls = type(value)
    description = describe(cls)
    for each in table.tables_of(value, description.tables).values() if description.tables else ():
        table.retire(each)
    retired = description.retired
    if not retired:  # only now: a method in Python makes every write ten times slower
        cls.__setattr__ = _refusing(cls.__setattr__, retired)  # type: ignore[method-assign]
    retired[id(value)] = value


def _refusing(
    write: Callable[[Any, str, Any], None], retired: Mapping[int, object]
) -> Callable[[Any, str, Any], None]:
    """`__setattr__` of a state class as it was, but for objects that are retired."""

    def __setattr__(self: object, name: str, value: object) -> None:  # noqa: N807
        if retired and id(self) in retired:
            raise Retired(f"{type(self).__name__}.{name}")
        write(self, name, value)

    return __setattr__
