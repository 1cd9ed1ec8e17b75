# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image lacks of a state, and what it has too much: explained, reported or refused."""

import dataclasses
from typing import Any, TypedDict

import msgspec
import pytest

import upgrader
from tests.unit.states import Room1, Room2, Room3, Tree
from upgrader.errors import UnreadableState
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import describe
from upgrader.protocol.state_codec import load, save


@dataclasses.dataclass
class Note1:
    text: str = ""
    by: str = ""


@dataclasses.dataclass
class Note2:
    text: str = ""
    at: int = upgrader.since(2, default=0)


def board(version: int, note: type, **fields: Any) -> type[Any]:
    made = dataclasses.make_dataclass(
        "Board",
        [
            ("first", note, dataclasses.field(default_factory=note)),
            ("notes", list[note], dataclasses.field(default_factory=list)),  # type: ignore[valid-type]
            ("named", dict[str, note | None], dataclasses.field(default_factory=dict)),  # type: ignore[valid-type]
            ("pairs", tuple[int, note], dataclasses.field(default_factory=lambda: (0, note()))),  # type: ignore[valid-type]
            *((name, *field) for name, field in fields.items()),
        ],
    )
    return upgrader.state("board", version=version, readable_from=1)(made)


def test_p6_a_missing_field_that_nothing_explains_is_refused() -> None:
    """In an older image, a newer one, and one of the same version."""

    @upgrader.state("room", version=2)
    class Forgetful:
        messages: int = 0
        topic: str = "none"

    with pytest.raises(UnreadableState, match=r"version 1 has saved no topic.*since\(2"):
        load(Forgetful, save(Room1(3)))

    @upgrader.state("room", version=2, readable_from=1)
    class Renamed:
        count: int = 0

    with pytest.raises(UnreadableState, match=r"version 2 has saved no messages.*convert_back"):
        load(Room1, save(Renamed(3)))

    @upgrader.state("room")
    class Same:
        messages: int = 0
        topic: str = upgrader.since(1, default="none")

    with pytest.raises(UnreadableState, match=r"version 1 has saved no topic.*raise its version"):
        load(Same, save(Room1(3)))


def test_p6_since_explains_only_older_images() -> None:
    """An image of the version that a field is of has to have it."""
    saved = SavedState("room", 2, 2, msgspec.msgpack.encode({"messages": 1}), shape=1)
    with pytest.raises(UnreadableState, match="version 2 has saved no topic"):
        load(Room3, saved)


def test_p6_version_0_1_0_did_not_save_what_was_at_its_default() -> None:
    """In a state that had been loaded without it: there `since` explains it in any version."""
    saved = SavedState("room", 2, 2, msgspec.msgpack.encode({"messages": 1}))
    assert Room3(1, "none", []) == load(Room3, saved)[0]
    assert Room2(1, "none") == load(Room2, saved)[0]

    @upgrader.state("room", version=2)
    class Renamed:
        total: int = 0

    assert (Renamed(0), ("messages",)) == load(Renamed, saved)
    with pytest.raises(UnreadableState, match="version 1 has saved no total"):
        load(Renamed, SavedState("room", 1, 1, saved.data))


def test_p6_a_default_is_saved_as_well() -> None:
    """A state that was loaded without a field saves it: a later version may have another default."""
    old, new = board(1, Note1), board(2, Note2, more=(int, upgrader.since(2, default=5)))
    loaded, _ = load(new, save(old(notes=[Note1()], named={"a": Note1(), "b": None})))
    note = {"text": "", "at": 0}

    assert {
        "first": note, "notes": [note], "named": {"a": note, "b": None}, "pairs": [0, note],
        "more": 5,
    } == msgspec.msgpack.decode(save(loaded).data)  # fmt: skip


def test_p6_what_is_missing_or_dropped_is_named_at_every_depth() -> None:
    """In a dataclass, a list of it, a dict, a tuple; what is not there is not named."""
    old, new = board(1, Note1), board(2, Note2)
    saved = save(old(Note1(), [Note1(), Note1()], {"a": Note1(), "b": None}, (1, Note1())))
    lost = ("first.by", "named[...].by", "notes[...].by", "pairs[1].by")

    value, dropped = load(new, saved)
    assert lost == dropped
    assert new(Note2(), [Note2(), Note2()], {"a": Note2(), "b": None}, (1, Note2())) == value
    assert ("first.by", "pairs[1].by") == load(new, save(old()))[1]

    saved = msgspec.structs.replace(save(new(notes=[Note2()])), readable_from=1)
    with pytest.raises(
        UnreadableState, match=r"no first\.by, notes\[\.\.\.\]\.by, pairs\[1\]\.by,"
    ):
        load(old, saved)


def test_p6_images_of_version_0_1_0_are_looked_at_as_closely() -> None:
    """They have no mark of their shape, and the same fields."""
    for value in (Room2(3, "x"), board(1, Note1)(notes=[Note1("a", "b")])):
        saved = msgspec.structs.replace(save(value), shape=msgspec.UNSET)

        assert (value, ()) == load(type(value), saved)
    old = msgspec.structs.replace(save(board(1, Note1)()), shape=msgspec.UNSET)
    assert ("first.by", "pairs[1].by") == load(board(2, Note2), old)[1]


def test_p6_a_field_that_may_be_absent_is_not_missed() -> None:
    """Unset ones, those of a TypedDict, and those that a struct leaves out."""

    class Lean(msgspec.Struct, omit_defaults=True):
        a: int = 0

    class Full(msgspec.Struct, tag=True):
        a: int = 0

    class Other(msgspec.Struct, tag=True):
        b: int = 0

    def declare(*more: Any) -> type[Any]:
        made = dataclasses.make_dataclass(
            "State",
            [
                ("unset", int | msgspec.UnsetType, msgspec.UNSET),
                ("options", Options, dataclasses.field(default_factory=dict)),
                ("lean", Lean, dataclasses.field(default_factory=Lean)),
                ("tagged", list[Full | Other], dataclasses.field(default_factory=list)),
                ("never", int, dataclasses.field(default=1, init=False)),
                *more,
            ],
        )
        return upgrader.state("x", version=1 + len(more))(made)

    old, new = declare(), declare(("more", int, upgrader.since(2, default=0)))
    value, dropped = load(new, save(old(tagged=[Full(1), Other(2)])))

    assert () == dropped
    assert [Full(1), Other(2)] == value.tagged


class Options(TypedDict, total=False):
    a: int


def test_p6_a_shape_is_told_from_another() -> None:
    """By the names at every depth, whatever the order; a class that holds itself has one, too."""
    mark = describe(board(1, Note1)).shape.mark

    assert mark == describe(board(7, Note1)).shape.mark
    assert mark != describe(board(1, Note2)).shape.mark
    assert describe(Room1).shape.mark != describe(Room2).shape.mark
    made = dataclasses.make_dataclass("State", [("value", Tree)])
    assert describe(upgrader.state("x")(made)).shape.mark
