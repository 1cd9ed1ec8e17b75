# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Table`: a dict as a field of a state, of which an upgrade need not move everything at once.

What a table writes costs nothing more than it costs a dict: only while changes are recorded, and after
the table has been given away, it is of another class, which has the methods that write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from upgrader.errors import DeclarationError, Retired

K = TypeVar("K")
V = TypeVar("V")

#: How the annotation of a table is told from that of a dict.
MARK = "upgrader.Table"


class Table(dict[K, V]):
    """A mutable mapping as a field of a state: `users: upgrader.Table[str, User] =
    dataclasses.field(default_factory=upgrader.Table)`.

    It is a dict in every respect but one: keys and values can never be changed in place, so that an
    upgrade sees what has changed by the keys that are set. Any other type is refused where the state
    is declared (DeclarationError). In an image it is a dict: a field may become a table, or a dict
    again, in any version. The order of the keys may be another one after an upgrade.
    """

    __slots__ = ("_changed",)
    _changed: set[Any]

    def __init_subclass__(cls, *, own: bool = False) -> None:
        if not own:  # while changes are recorded, it would be without what it adds
            why = "a Table has no subclasses: it is a dict when it is loaded"
            raise DeclarationError(
                f"class {cls.__name__}", why, remedy="write methods of the state instead"
            )

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # A copy records nothing, and can be written to.
        return Table, (dict(self),)

    if not TYPE_CHECKING:
        # What an annotation becomes: msgspec decodes it as the dict that it is.
        def __class_getitem__(cls, types):
            import msgspec  # a state that has a table is decoded, too

            key, value = types
            return Annotated[dict[key, value], msgspec.Meta(extra={MARK: True})]


class _Recorded(Table, own=True):  # type: ignore[type-arg]
    """A table of which the keys that change are recorded; after the change, so that whoever takes a
    key from the record finds what belongs to it."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        dict.__setitem__(self, key, value)
        self._changed.add(key)

    def __delitem__(self, key: Any) -> None:
        dict.__delitem__(self, key)
        self._changed.add(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def pop(self, key: Any, *default: Any) -> Any:
        value = dict.pop(self, key, *default)
        self._changed.add(key)
        return value

    def popitem(self) -> tuple[Any, Any]:
        key, value = dict.popitem(self)
        self._changed.add(key)
        return key, value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        value = dict.setdefault(self, key, default)
        self._changed.add(key)
        return value

    def update(self, *others: Any, **more: Any) -> None:
        changed = dict(*others, **more)
        dict.update(self, changed)
        self._changed.update(changed)

    def clear(self) -> None:
        keys = list(self)
        dict.clear(self)
        self._changed.update(keys)


class _Retired(Table, own=True):  # type: ignore[type-arg]
    """A table of another instance's: nothing can be written to it here."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Retired("Table")

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = setdefault = update = clear = _refuse


def record(table: Table[Any, Any], changed: set[Any]) -> None:
    """From here on, put the keys that change into `changed`."""
    table._changed = changed
    table.__class__ = _Recorded


def forget(table: Table[Any, Any]) -> None:
    """Record no changes any more, unless it has been given away."""
    if isinstance(table, _Recorded):
        table._changed = set()  # a thread may be in the middle of a write
        table.__class__ = Table  # type: ignore[assignment]


def retire(table: Table[Any, Any]) -> None:
    """Make a table read-only: whatever writes to it raises Retired from now on."""
    table.__class__ = _Retired


def tables_of(value: object, names: Iterable[str]) -> dict[str, Table[Any, Any]]:
    """The tables in these fields of a state; without those in which something else has been put."""
    found = {name: getattr(value, name) for name in names}
    return {name: table for name, table in found.items() if isinstance(table, Table)}


def make(value: object, names: Iterable[str]) -> None:
    """Turn the dicts in these fields of a state that was decoded into tables."""
    for name in names:
        found = getattr(value, name)
        if isinstance(found, dict) and not isinstance(found, Table):
            object.__setattr__(value, name, Table(found))


def unfinished(cls: type) -> type:
    """What is decoded in place of a state: its `__post_init__` may read tables, which come later."""
    if not hasattr(cls, "__post_init__"):
        return cls
    more = {"__slots__": (), "__post_init__": lambda self: None}
    return type(cls.__name__, (cls,), more)


def finish(value: Any, cls: type) -> None:
    """Make the state of that, once its tables are there; raises what `__post_init__` raises."""
    if type(value) is not cls:
        object.__setattr__(value, "__class__", cls)
        value.__post_init__()
