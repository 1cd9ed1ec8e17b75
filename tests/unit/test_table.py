# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `Table` is a dict in an image, and holds nothing that can be changed in place."""

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

import upgrader
from upgrader.errors import DeclarationError, Retired
from upgrader.instance.declarations import Connections, Declarations
from upgrader.protocol.state import retire
from upgrader.protocol.state_codec import load, save


class User(msgspec.Struct, frozen=True):
    name: str
    groups: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    at: datetime.datetime | None = None
    before: "Line | None" = None


class Pair(NamedTuple):
    a: int
    b: frozenset[bytes]


class Loose(msgspec.Struct):
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Half:
    names: list[str]


@upgrader.state("rooms")
class Rooms:
    count: int = 0
    users: upgrader.Table[str, User] = dataclasses.field(default_factory=upgrader.Table)


@upgrader.state("rooms")
class Plain:
    count: int = 0
    users: dict[str, User] = dataclasses.field(default_factory=dict)


def filled() -> Rooms:
    rooms = Rooms(3)
    rooms.users["a"] = User("A", ("x",))
    return rooms


def test_it_crosses_as_a_dict() -> None:
    """What a library without tables writes, and reads, is the same."""
    saved, plain = save(filled()), save(Plain(3, {"a": User("A", ("x",))}))

    assert saved == plain
    there, unknown = load(Rooms, plain)
    assert (filled(), ()) == (there, unknown)
    assert upgrader.Table is type(there.users)
    assert dict is type(load(Plain, saved)[0].users)


def test_a_dict_in_its_place_becomes_a_table() -> None:
    """That of a cold start, whatever the default is."""

    @upgrader.state("dicts")
    class Dicts:
        users: upgrader.Table[str, int] = dataclasses.field(default_factory=dict)  # type: ignore[assignment]

    declarations = Declarations("x")
    declared = declarations.add_state(Dicts)
    declared.fill(None)

    assert upgrader.Table is type(declared.value.users)


GOOD = [
    (int, str), (bytes, User), (tuple[int, str], Line), (str, Pair), (str, int | None),
    (str, tuple[User, int]), (str, frozenset[int]), (datetime.date, bytes),
]  # fmt: skip


@pytest.mark.parametrize("types", GOOD, ids=str)
def test_what_never_changes_may_be_in_it(types: tuple[Any, Any]) -> None:
    made = dataclasses.make_dataclass("Made", [("table", upgrader.Table[types], None)])  # type: ignore[valid-type]

    assert ("table",) == upgrader.protocol.state.describe(upgrader.state("x")(made)).tables  # type: ignore[attr-defined]


BAD: list[tuple[Any, str]] = [
    ((str, list[int]), "table[...] is a list, which can be changed in place"),
    ((str, dict[str, int]), "table[...] is a dict"),
    ((str, set[int]), "table[...] is a set"),
    ((str, bytearray), "table[...] is a bytearray"),
    ((str, Any), "table[...] is a any"),
    ((str, Loose), "table[...] is a Loose, which is not frozen"),
    ((str, Half), "table[...].names is a list"),
    ((str, tuple[int, Loose]), "table[...][1] is a Loose"),
    ((str, int | Half), "table[...].names is a list"),
    ((tuple[Loose, int], int), "table[key][0] is a Loose"),
]


@pytest.mark.parametrize(("types", "why"), BAD, ids=lambda each: str(each)[:40])
def test_what_can_be_changed_in_place_is_refused(types: Any, why: str) -> None:
    """Where the state is declared, by the path, with what to write instead."""
    made = dataclasses.make_dataclass("Made", [("table", upgrader.Table[types], None)])

    with pytest.raises(DeclarationError, match="declare the class frozen") as caught:
        upgrader.state("x")(made)

    assert why in str(caught.value)


@pytest.mark.parametrize(
    "annotation", [list[upgrader.Table[str, int]], dict[str, upgrader.Table[str, int]], Half]
)
def test_a_table_lies_in_the_state_itself(annotation: Any) -> None:
    if annotation is Half:
        annotation = dataclasses.make_dataclass("In", [("inner", upgrader.Table[str, int])])
    made = dataclasses.make_dataclass("Made", [("value", annotation, None)])

    with pytest.raises(DeclarationError, match="only a field of the state itself"):
        upgrader.state("x")(made)


def test_no_connection_has_a_table() -> None:
    declarations = Declarations("x")
    bound: Any = type("B", (), {"name": "door"})()

    with pytest.raises(DeclarationError, match="not of each connection's"):
        declarations.add_connections(Connections(bound, Rooms, lambda peer: None))


def test_a_table_has_no_subclasses() -> None:
    """While changes are recorded, it would be without its methods; and it comes back without them."""
    with pytest.raises(DeclarationError, match="write methods of the state"):

        class Users(upgrader.Table[str, int] if TYPE_CHECKING else upgrader.Table):  # type: ignore[misc]
            pass


WRITES: list[Any] = [
    lambda t: t.__setitem__("b", User("B")), lambda t: t.__delitem__("a"), lambda t: t.pop("a"),
    lambda t: t.popitem(), lambda t: t.setdefault("b", User("B")), lambda t: t.update(b=User("B")),
    lambda t: t.clear(), lambda t: t.__ior__({}),
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_written_to_one_that_was_given_away(write: Any) -> None:
    """It can be read still."""
    rooms = filled()
    retire(rooms)

    with pytest.raises(Retired):
        write(rooms.users)

    assert {"a": User("A", ("x",))} == rooms.users


def test_a_table_is_written_as_fast_as_a_dict() -> None:
    """It has no method in Python as long as nothing is recorded."""
    assert not {*vars(upgrader.Table)} & {"__setitem__", "__delitem__", "update", "pop"}
