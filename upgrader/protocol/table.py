# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Table`: a dict as a field of a state, of which an upgrade need not move everything at once.

What a table writes costs nothing more than it costs a dict: only while changes are recorded, and after
the table has been given away, it is of another class, which has the methods that write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from upgrader.errors import Retired

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

    if not TYPE_CHECKING:
        # What an annotation becomes: msgspec decodes it as the dict that it is.
        def __class_getitem__(cls, types):
            import msgspec  # a state that has a table is decoded, too

            key, value = types
            return Annotated[dict[key, value], msgspec.Meta(extra={MARK: True})]


class _Retired(Table):  # type: ignore[type-arg]
    """A table of another instance's: nothing can be written to it here."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Retired("Table")

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = setdefault = update = clear = _refuse


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
