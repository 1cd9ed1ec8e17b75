# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fields of a state at every depth: what can never be saved, what an image lacks or has too much.

Built once from the annotations of a class. It reads data that was decoded without a type, because
msgspec drops what a class does not know and fills in defaults without a word.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from upgrader.errors import DeclarationError
from upgrader.protocol.kinds import SINCE
from upgrader.protocol.table import MARK
from upgrader.protocol.table_types import find_changeable

#: One of each kind of value that comes out of msgpack: what is none of them is never loaded.
_LOADABLE: tuple[Any, ...] = (
    None,
    False,
    0,
    0.0,
    "",
    b"",
    [],
    {},
    datetime(2000, 1, 1, tzinfo=UTC),
)
_REMEDY = "keep it beside the state, and make it anew in each instance"
_FROZEN = "declare the class frozen, and use tuples and frozensets in it; or use a dict"
_LONGEST = 200  # characters of a path that are shown
_NAMED = 20  # fields that are named in a message before only their number is

#: How to get somewhere: the way before, and the next step ("[...]" into a container).
Path: TypeAlias = tuple["Path", str] | None
Node: TypeAlias = "_Record | _Each | _Places | _Either"


class _Record(msgspec.Struct, eq=False):
    """Named fields of a class. `inside`: what lies in those that have more below; `first`: the
    version since which a field is there, None if it has always been; fields that may be absent are
    not in it."""

    cls: type
    names: frozenset[str]
    first: Mapping[str, int | None]
    tag: tuple[str, Any] | None
    inside: dict[str, Node] = msgspec.field(default_factory=dict)


class _Each(msgspec.Struct, frozen=True, eq=False):
    """A list, a set, or the values of a dict: the same in all."""

    item: Node


class _Places(msgspec.Struct, frozen=True, eq=False):
    """A tuple: something else in each place."""

    items: tuple[Node | None, ...]


class _Either(msgspec.Struct, frozen=True, eq=False):
    """A union."""

    kinds: tuple[Node, ...]


class Differences(msgspec.Struct, frozen=True):
    """Where saved fields and a class differ: `unknown` to the class, and `missing` in the data,
    with the version since which each is there, None if it has always been."""

    unknown: tuple[str, ...] = ()
    missing: tuple[tuple[str, int | None], ...] = ()


class Shape:
    """The fields of one state class, at every depth."""

    def __init__(self, cls: type, item: str) -> None:
        """`item` names the state in messages.

        Raises DeclarationError for a field that can never be saved and loaded, NameError for an
        annotation whose name is not defined yet.
        """
        try:
            info = inspect.type_info(cls)
        except (TypeError, ValueError) as error:
            raise DeclarationError(item, _blame(cls), remedy=_REMEDY) from error
        builder = _Builder(item)
        root = builder.node(info, None)
        assert isinstance(root, _Record)
        self._root = root
        self.tables = tuple(builder.tables)  #: the fields that are a `Table`
        #: The same for two classes with the same fields at every depth.
        self.mark = zlib.crc32("\n".join(sorted(_lines(root))).encode())

    def compare(self, data: bytes) -> Differences:
        """Where the fields in `data` differ from these; raises msgspec.DecodeError."""
        fields = msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])
        found = _Comparison()
        # Only what has fields of its own further down is decoded.
        inside = {
            name: msgspec.msgpack.decode(fields[name])
            for name in self._root.inside
            if name in fields
        }
        found.compare(self._root, [{**fields, **inside}], None)
        return found.differences

    def compare_table(self, field: str, data: memoryview, values: object) -> Differences:
        """Where the values of a table in a pair of them and keys, `data`, differ; likewise. The
        default of what is missing is written into `values`, which are the same, decoded."""
        found = _Comparison()
        if node := self._root.inside.get(field):
            entries, _ = msgspec.msgpack.decode(data)
            found.compare(node, [entries], (None, field))
            if found.missing:
                _complete(node, values)
        return found.differences

    def complete(self, value: object) -> None:
        """Write the default of each missing field into the objects of a loaded state.

        msgspec leaves it to the class, and would not save it: a later version may have another.
        """
        _complete(self._root, value)


def name_some(paths: Iterable[str]) -> str:
    """Fields as a message names them: the first of them, and how many more there are."""
    paths = list(paths)
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more


class _Builder:
    def __init__(self, item: str) -> None:
        self._item = item
        self.tables: list[str] = []
        self._known: dict[int, _Record] = {}  # a class may hold itself
        self._alive: list[inspect.Type] = []  # so that no id is used twice

    def node(self, info: inspect.Type, path: Path) -> Node | None:
        """What lies below a type; None if nothing there has fields."""
        match info:
            case inspect.CustomType(cls):
                self._check(cls, path)
            case inspect.Metadata(type=inner, extra=extra):
                if extra and MARK in extra:
                    self._add_table(inner, path)
                return self.node(inner, path)
            case inspect.DictType(key_type=key, value_type=value):
                self.node(key, (path, "[key]"))
                return _each(self.node(value, (path, "[...]")))
            case inspect.CollectionType(item_type=item):
                return _each(self.node(item, (path, "[...]")))
            case inspect.TupleType(item_types=items):
                return self._places(items, path)
            case inspect.NamedTupleType(fields=fields):
                return self._places([field.type for field in fields], path)
            case inspect.StructType(array_like=True, fields=fields):
                return self._places([field.type for field in fields], path)
            case inspect.UnionType(types=types):
                kinds = tuple(kind for each in types if (kind := self.node(each, path)))
                return _Either(kinds) if kinds[1:] else next(iter(kinds), None)
            case inspect.DataclassType() | inspect.StructType() | inspect.TypedDictType():
                return self._record(info, path)
        return None

    def _add_table(self, info: inspect.Type, path: Path) -> None:
        assert isinstance(info, inspect.DictType)
        assert path
        before, name = path
        if before or name.startswith("["):
            why = f"{_show(path)} is a Table, and only a field of the state itself can be one"
            raise DeclarationError(self._item, why, remedy="use a dict there")
        why = find_changeable(info.key_type, f"{name}[key]")
        why = why or find_changeable(info.value_type, f"{name}[...]")
        if why:
            raise DeclarationError(self._item, why, remedy=_FROZEN)
        self.tables.append(name)

    def _record(
        self,
        info: inspect.DataclassType | inspect.StructType | inspect.TypedDictType,
        path: Path,
    ) -> _Record:
        if id(info) in self._known:
            return self._known[id(info)]
        tag = None
        if isinstance(info, inspect.StructType) and info.tag_field:
            tag = info.tag_field, info.tag
        names = frozenset(field.encode_name for field in info.fields)
        cls = getattr(info.cls, "__origin__", info.cls)
        record = _Record(cls, names, _first(info), tag)
        self._known[id(info)] = record
        self._alive.append(info)
        for field in info.fields:
            if inner := self.node(field.type, (path, field.encode_name)):
                record.inside[field.encode_name] = inner
        return record

    def _places(self, types: Iterable[inspect.Type], path: Path) -> _Places | None:
        items = tuple(self.node(each, (path, f"[{place}]")) for place, each in enumerate(types))
        return _Places(items) if any(items) else None

    def _check(self, cls: type, path: Path) -> None:
        try:
            loadable = any(isinstance(value, cls) for value in _LOADABLE)
        except TypeError:  # a Protocol, say: loading would raise the same
            loadable = False
        if not loadable:
            name = getattr(cls, "__qualname__", repr(cls))
            module = getattr(cls, "__module__", "builtins")
            full = name if module == "builtins" else f"{module}.{name}"
            raise DeclarationError(
                self._item,
                f"{_show(path)} is a {full}, which can never be saved and loaded",
                remedy=_REMEDY,
            )


class _Comparison:
    """Collects where data differs: all values of one place in the shape at once."""

    def __init__(self) -> None:
        self.unknown: set[tuple[Path, str]] = set()
        self.missing: dict[tuple[Path, str], int | None] = {}

    @property
    def differences(self) -> Differences:
        """All that was found."""
        missing = sorted((_show(path), first) for path, first in self.missing.items())
        return Differences(tuple(sorted(map(_show, self.unknown))), tuple(missing))

    def compare(self, node: Node, values: Collection[Any], path: Path) -> None:
        if not values:
            return
        match node:
            case _Record():
                self._record(node, [v for v in values if isinstance(v, dict)], path)
            case _Each(item):
                dicts = [v.values() for v in values if isinstance(v, dict)]
                lists = [v for v in values if isinstance(v, list)]
                self.compare(item, [*chain(*dicts, *lists)], (path, "[...]"))
            case _Places(items):
                for place, inner in enumerate(items):
                    if inner:
                        found = [v[place] for v in values if isinstance(v, list) and v[place:]]
                        self.compare(inner, found, (path, f"[{place}]"))
            case _Either(kinds):
                chosen = [(_choose(kinds, v), v) for v in values]
                for kind in kinds:
                    self.compare(kind, [v for each, v in chosen if each is kind], path)

    def _record(self, record: _Record, values: list[dict[str, Any]], path: Path) -> None:
        known = record.names | ({record.tag[0]} if record.tag else set())
        for names in {tuple(value) for value in values}:
            self.unknown.update((path, name) for name in set(names) - known)
            for name in record.first.keys() - set(names):
                self.missing[path, name] = record.first[name]
        for name, inner in record.inside.items():
            self.compare(inner, [v[name] for v in values if name in v], (path, name))


def _complete(node: Node, value: Any) -> None:
    match node:
        case _Record() if isinstance(value, dict):  # a TypedDict
            for name, inner in node.inside.items():
                if name in value:
                    _complete(inner, value[name])
        case _Record() if isinstance(value, node.cls):
            own = vars(value) if hasattr(value, "__dict__") else node.first
            for name in node.first:
                if name not in own:
                    object.__setattr__(value, name, getattr(value, name))
            for name, inner in node.inside.items():
                _complete(inner, getattr(value, name, None))
        case _Each(item) if isinstance(value, Collection):
            for each in value.values() if isinstance(value, dict) else value:
                _complete(item, each)
        case _Places(items) if isinstance(value, tuple):
            for inner_or_none, each in zip(items, value, strict=False):
                if inner_or_none:
                    _complete(inner_or_none, each)
        case _Either(kinds):
            for kind in kinds:
                _complete(kind, value)


def _first(
    info: inspect.DataclassType | inspect.StructType | inspect.TypedDictType,
) -> dict[str, int | None]:
    """Since when each field is saved; without those that may be absent."""
    if isinstance(info, inspect.TypedDictType):
        return {}  # its own annotations say which
    cls: Any = getattr(info.cls, "__origin__", info.cls)
    if isinstance(info, inspect.StructType) and cls.__struct_config__.omit_defaults:
        return {}
    declared = getattr(cls, "__dataclass_fields__", {})
    first = {}
    for field in info.fields:
        own = declared.get(field.name)
        unset = not field.required and field.default is field.default_factory  # both are not there
        # One with init=False may never have been set: its value is the default of the class then.
        if unset or (own and not own.init and own.default is not dataclasses.MISSING):
            continue
        first[field.encode_name] = own.metadata.get(SINCE) if own else None
    return first


def _choose(kinds: Iterable[Node], value: Any) -> Node | None:
    """The member of a union that a value is one of."""
    for kind in kinds:
        if isinstance(kind, _Record):
            tagged = kind.tag is None or (isinstance(value, dict) and kind.tag[0] in value)
            if isinstance(value, dict) and tagged:
                if kind.tag and value[kind.tag[0]] != kind.tag[1]:
                    continue
                return kind
        elif isinstance(value, list) or (isinstance(value, dict) and isinstance(kind, _Each)):
            return kind
    return None


def _each(item: Node | None) -> _Each | None:
    return _Each(item) if item else None


def _lines(root: Node) -> Iterator[str]:
    """The fields of every class below, each class where it is found first."""
    seen: set[int] = set()

    def below(node: Node | None, path: str) -> Iterator[str]:
        match node:
            case _Record():
                if id(node) in seen:
                    return
                seen.add(id(node))
                yield f"{path}:{','.join(sorted(node.names))}"
                for name, inner in sorted(node.inside.items()):
                    yield from below(inner, f"{path}.{name}")
            case _Each(item):
                yield from below(item, f"{path}[]")
            case _Places(nodes) | _Either(nodes):
                for place, each in enumerate(nodes):
                    yield from below(each, f"{path}[{place}]")

    yield from below(root, "")


def _blame(hint: Any, path: Path = None) -> str:
    """What in an annotation msgspec cannot take, with its path; empty if there is no such thing."""
    try:
        inspect.type_info(hint)
    except (TypeError, ValueError) as error:
        below: list[tuple[Path, Any]]
        if isinstance(hint, type) and hasattr(hint, "__annotations__"):
            hints = get_type_hints(hint, include_extras=True)
            below = [((path, name), part) for name, part in hints.items()]
        else:
            union = get_origin(hint) in (Union, UnionType, Annotated)
            below = [(path if union else (path, "[...]"), part) for part in get_args(hint)]
        for way, part in below:
            if found := _blame(part, way):
                return found
        return f"{_show(path) or 'it'} can never be saved and loaded: {error}"
    return ""


def _show(path: Path) -> str:
    parts: list[str] = []
    while path is not None:
        path, step = path
        parts.append(step if step.startswith("[") else f".{step}")
    text = "".join(reversed(parts)).removeprefix(".")
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return text if text.isprintable() else repr(text)
