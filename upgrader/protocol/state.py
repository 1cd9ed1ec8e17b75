# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed, versioned application state.

The version rules are those of QEMU's VMStateDescription, with one turned around: the *image*
says from which version on it can be read, because old code cannot know newer code. For a version
that has other fields the newer one makes those, too (`convert_back`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    UnreadableState,
    UnsavableState,
)
from upgrader.protocol.kinds import SINCE
from upgrader.protocol.later import later
from upgrader.protocol.values import Value

if TYPE_CHECKING:
    import msgspec

    from upgrader.protocol import saved_state, state_shape, state_trial, table
    from upgrader.protocol.saved_state import SavedState
else:
    msgspec = later("msgspec", loading=True)
    saved_state = later("upgrader.protocol.saved_state", loading=True)
    state_shape = later("upgrader.protocol.state_shape", loading=True)
    state_trial = later("upgrader.protocol.state_trial")
    table = later("upgrader.protocol.table", loading=True)

T = TypeVar("T")
Converter = Callable[[dict[str, Any]], dict[str, Any]]


_CONVERTED = 0  # in place of the mark of a shape
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


def save(value: object) -> SavedState:
    """Encode a state; raises UnsavableState for a field that msgspec cannot encode."""
    d = describe(type(value))
    try:
        data = msgspec.msgpack.encode(value)
    except Exception as error:
        raise UnsavableState(d.item, state_trial.blame(value) or str(error)) from error
    return saved_state.SavedState(d.name, d.version, d.readable_from, data, shape=d.shape.mark)


def encode(value: object | None) -> bytes:
    """The fields of a state; nothing for None. Raises UnsavableState like `save`."""
    if value is None:
        return b""
    _described(type(value))
    try:
        return _encoder()(value)
    except Exception:
        return save(value).data  # which says why not


#: Thousands may be of one class, and clients wait.
_described: Callable[[type], StateVersions] = functools.cache(describe)


@functools.cache
def _encoder() -> Callable[[object], bytes]:
    """Looked up once: thousands of states may be encoded while clients wait."""
    return msgspec.msgpack.Encoder().encode


def convert_for(cls: type, saved: SavedState, reader: int | None) -> SavedState:
    """A state that `cls` has saved, as version `reader` of it wants it; if nobody knows who will
    read it (None), with all earlier forms beside.

    Raises UnsavableState for a converter that fails.
    """
    d = describe(cls)
    wanted = [v for v in sorted(d.backward, reverse=True) if reader is None or v >= reader]
    if not wanted:
        return saved
    forms: dict[int, bytes] = {}
    fields = msgspec.msgpack.decode(saved.data)
    for version in wanted:
        try:
            fields = d.backward[version](fields)
            if not isinstance(fields, dict):
                raise TypeError(f"returned {type(fields).__name__}, not a dict")
            forms[version] = msgspec.msgpack.encode(fields)
        except Exception as error:  # the author's converters raise what they like
            why = f"cannot be converted back to version {version}: {type(error).__name__}: {error}"
            raise UnsavableState(d.item, why) from error
    if reader is None:
        return msgspec.structs.replace(saved, earlier=forms)
    return saved_state.SavedState(
        d.name, wanted[-1], d.readable_from, forms[wanted[-1]], shape=_CONVERTED
    )


def header(cls: type) -> SavedState:
    """Name and versions of a state class, without data."""
    d = describe(cls)
    return saved_state.SavedState(d.name, d.version, d.readable_from, b"", shape=d.shape.mark)


def load(
    cls: type[T], saved: SavedState, fill: Callable[[T], tuple[str, ...]] | None = None
) -> tuple[T, tuple[str, ...]]:
    """Decode a saved state into `cls`; also returns the fields, at every depth, that `cls` does not
    know. `fill` puts tables into it that came apart, and returns such fields of those.

    Raises IncompatibleState where the versions cannot meet, UnreadableState where it is another
    state, where the fields do not decode, and where one is missing that no `since` explains; and what
    `fill` raises.
    """
    d = describe(cls)
    if saved.name != d.name:
        raise UnreadableState(d.item, f"the image has state {saved.name!r} in its place")
    d.check_readable(saved.version, saved.readable_from)
    version, data = _form_for(d, saved)
    unknown: tuple[str, ...] = ()
    with _readable(d, saved):
        if version < d.version:
            data = _to_version(d, version, data)
        value = d.decode(data)
        found = None
        if not (data is saved.data and saved.shape == d.shape.mark):
            found = d.shape.compare(data)
            unknown = found.unknown
            if found.missing:
                d.shape.complete(value)
    if found:
        old = saved.shape is msgspec.UNSET
        require_explained(d, saved.version, found.missing, version, old=old)
    if d.tables:
        if fill:
            unknown += fill(value)
        table.make(value, d.tables)
        with _readable(d, saved):
            table.finish(value, cls)
    return value, unknown


@contextlib.contextmanager
def _readable(d: StateVersions, saved: SavedState) -> Iterator[None]:
    """Raise UnreadableState for whatever is raised: the author's converters and `__post_init__` raise what
    they like."""
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, msgspec.MsgspecError) else f"{type(error).__name__}: "
        why = f"version {saved.version} does not decode: {name}{error}"
        raise UnreadableState(d.item, why) from error


def require_explained(
    d: StateVersions,
    saved: int,
    missing: Iterable[tuple[str, int | None]],
    version: int | None = None,
    *,
    old: bool = False,
) -> None:
    """Raise UnreadableState for fields, with the version since which each is there, that are missing
    in what version `saved` has saved, unless a `since` explains that. `version`: of what was made of
    it, if converters have run; `old`: version 0.1.0 of the library wrote it."""
    version = saved if version is None else version
    if unexplained := [path for path, first in missing if not _explained(d, version, first, old)]:
        raise UnreadableState(
            d.item,
            f"version {saved} has saved no {state_shape.name_some(unexplained)}, and version"
            f" {d.version} does not say why",
            remedy=_remedy(d, saved),
        )


def decoder(cls: type[T], header: SavedState) -> Callable[[bytes], T] | None:
    """What decodes many states that this very version of `cls` has saved, as `header` says of all of
    them; None for any other, which `load` must look at. `load` says why, if it raises."""
    d = describe(cls)
    mine = header.name, header.version, header.shape, header.earlier
    if mine != (d.name, d.version, d.shape.mark, msgspec.UNSET):
        return None
    return d.decode


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


def _form_for(d: StateVersions, saved: SavedState) -> tuple[int, bytes]:
    """The form of a saved state that is the next to what this program has, and its version."""
    if saved.version > d.version and saved.earlier:
        version = min((v for v in saved.earlier if d.version <= v), default=saved.version)
        if version < saved.version:
            return version, saved.earlier[version]
    return saved.version, saved.data


def _to_version(d: StateVersions, version: int, data: bytes) -> bytes:
    """The fields of a saved state after all converters that lie in between."""
    converters = {v: d.converters[v] for v in sorted(d.converters) if version <= v < d.version}
    if not converters:
        return data
    fields = msgspec.msgpack.decode(data, type=dict[str, Any])
    for v, converter in converters.items():
        fields = converter(fields)
        if not isinstance(fields, dict):
            raise TypeError(
                f"the converter from {v} has returned {type(fields).__name__}, not a dict"
            )
    # Back to bytes: only msgpack's own decoder turns each of them into what the class declares.
    return msgspec.msgpack.encode(fields)


def _explained(d: StateVersions, version: int, first: int | None, old: bool) -> bool:
    """Whether a field of `first` may be missing in what `version` has saved.

    `old`: version 0.1.0 of the library wrote it, and did not save a field at its default in a state
    that had been loaded without it.
    """
    if old:
        return first is not None or version == d.version
    return first is not None and version < first


def _remedy(d: StateVersions, version: int) -> str:
    """What makes a state with a missing field readable."""
    if version > d.version:
        return f"that version needs @upgrader.convert_back(..., {d.version}), or no readable_from="
    if version == d.version:
        return "raise its version, and declare a new field with upgrader.since()"
    return (
        f"declare a new field with upgrader.since({d.version}, default=...),"
        f" and what became of an old one with @upgrader.convert(..., {d.version - 1})"
    )


def _refusing(
    write: Callable[[Any, str, Any], None], retired: Mapping[int, object]
) -> Callable[[Any, str, Any], None]:
    """`__setattr__` of a state class as it was, but for objects that are retired."""

    def __setattr__(self: object, name: str, value: object) -> None:  # noqa: N807
        if retired and id(self) in retired:
            raise Retired(f"{type(self).__name__}.{name}")
        write(self, name, value)

    return __setattr__
