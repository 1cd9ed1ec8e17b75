# SPDX-License-Identifier: LGPL-2.1-or-later
"""State: what crosses from one version of a class to another, and what is refused."""

import dataclasses
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import msgspec
import pytest

import upgrader
from upgrader.errors import DeclarationError, IncompatibleState, Retired, UnreadableState
from upgrader.state import SavedState, describe, encode, header, load, retire, save


@upgrader.state("room", version=1)
class Room1:
    messages: int = 0


@upgrader.state("room", version=2, readable_from=1)
class Room2:
    messages: int = 0
    topic: str = upgrader.since(2, default="none")


@upgrader.state("room", version=3)
class Room3:
    messages: int = 0
    topic: str = upgrader.since(2, default="none")
    tags: list[str] = upgrader.since(3, default_factory=list)


# Versions


def test_the_same_version_loads_what_it_saved() -> None:
    """A state comes back equal, and nothing is dropped."""
    assert (Room2(3, "x"), ()) == load(Room2, save(Room2(3, "x")))


def test_a_new_field_takes_its_default() -> None:
    """An older image has no such field; every object gets a default of its own."""
    first, _ = load(Room3, save(Room1(7)))
    second, _ = load(Room3, save(Room1(7)))

    assert Room3(7, "none", []) == first
    assert first.tags is not second.tags


def test_a_downgrade_reports_the_fields_it_drops() -> None:
    """A version that the image says can read it loads it without what it does not know."""
    assert (Room1(3), ("topic",)) == load(Room1, save(Room2(3, "x")))


def test_a_downgrade_below_readable_from_is_refused() -> None:
    """The message names the state and all the versions."""
    with pytest.raises(IncompatibleState) as caught:
        load(Room1, save(Room3()))

    error = caught.value
    assert ("room", 3, 3, 1) == (error.name, error.offered, error.readable_from, error.own)
    for text in ("'room'", "version 3", "version 1", "the image is kept"):
        assert text in str(error)


def test_a_field_that_the_same_version_does_not_know_is_reported() -> None:
    """A forgotten new version number is not a silent loss."""

    @upgrader.state("room")
    class Forgot:
        messages: int = 0
        extra: int = 1

    assert (Room1(5), ("extra",)) == load(Room1, save(Forgot(5)))


def test_another_state_is_refused() -> None:
    """Fields of a foreign state would all be dropped and replaced by defaults."""

    @upgrader.state("hall")
    class Hall:
        size: int = 1

    with pytest.raises(UnreadableState, match=r"'room'.*has state 'hall'"):
        load(Room1, save(Hall()))


def test_fields_that_do_not_decode_are_refused_by_name() -> None:
    """The message says which state, version and field."""
    saved = SavedState("room", 1, 1, msgspec.msgpack.encode({"messages": "many"}))

    with pytest.raises(UnreadableState, match=r"state 'room': version 1 .*\$\.messages"):
        load(Room1, saved)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81", b"\x90", b"\x81\xa1\xff\x01"])
def test_damaged_data_is_refused(data: bytes) -> None:
    """Whatever the bytes are, the error names the state."""
    for version in (1, 2):
        with pytest.raises(UnreadableState, match="'room'"):
            load(Room1, SavedState("room", version, 1, data))


def test_a_post_init_that_refuses_is_named() -> None:
    """Any exception of the author's own code says which state refused."""

    @upgrader.state("strict")
    class Strict:
        value: int = 0

        def __post_init__(self) -> None:
            if self.value:
                raise RuntimeError("no such value")

    saved = SavedState("strict", 1, 1, msgspec.msgpack.encode({"value": 1}))

    with pytest.raises(UnreadableState, match=r"'strict'.*RuntimeError: no such value"):
        load(Strict, saved)


# Converting


def renamed() -> type[Any]:
    @upgrader.state("house", version=3)
    class House:
        people: int = 0
        built: date = date(1900, 1, 1)

    @upgrader.convert(House, 1)
    def from_1(fields: dict[str, Any]) -> dict[str, Any]:
        fields["inhabitants"] = fields.pop("count")
        return fields

    @upgrader.convert(House, 2)
    def from_2(fields: dict[str, Any]) -> dict[str, Any]:
        return {"people": fields.pop("inhabitants"), **fields}

    return House


def house(version: int, **fields: Any) -> SavedState:
    return SavedState("house", version, version, msgspec.msgpack.encode(fields))


def test_converters_form_a_chain() -> None:
    """An image of version 1 goes through every converter on its way to version 3."""
    cls = renamed()

    assert (cls(people=4), ()) == load(cls, house(1, count=4))
    assert (cls(people=5), ()) == load(cls, house(2, inhabitants=5))
    assert (cls(people=6), ()) == load(cls, house(3, people=6))


def test_converters_may_return_objects() -> None:
    """What a converter returns is encoded like a state."""
    cls = renamed()
    upgrader.convert(cls, 2)(lambda fields: {"built": date(2000, 1, 2)})

    assert cls(0, date(2000, 1, 2)) == load(cls, house(2))[0]


@pytest.mark.parametrize(
    ("converter", "message"),
    [(lambda fields: None, "does not decode"), (lambda fields: fields.popitem()[9], "IndexError")],
)
def test_a_converter_that_fails_is_named(converter: Any, message: str) -> None:
    """A converter that raises or returns nonsense refuses the state, by name."""
    cls = renamed()
    upgrader.convert(cls, 1)(converter)

    with pytest.raises(UnreadableState, match=f"'house': version 1.*{message}"):
        load(cls, house(1, count=1))


@pytest.mark.parametrize("version", [0, 3, 4])
def test_only_older_versions_can_be_converted(version: int) -> None:
    """There is nothing to convert from the present version or a later one."""
    with pytest.raises(DeclarationError, match=f"'house'.*convert {version}"):
        upgrader.convert(renamed(), version)


# Types


class Colour(Enum):
    RED = "r"


class Word(StrEnum):
    YES = "yes"


@dataclasses.dataclass
class Inner:
    data: bytes = b""
    when: datetime | None = None


TYPES: dict[str, tuple[Any, Any]] = {
    "bytes": (bytes, b"\xff\0"),
    "bytearray": (bytearray, bytearray(b"\xff")),
    "aware datetime": (datetime, datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
    "naive datetime": (datetime, datetime(2026, 1, 2, 3, 4)),
    "date": (date, date(2026, 1, 2)),
    "time": (time, time(1, 2)),
    "timedelta": (timedelta, timedelta(seconds=1.5)),
    "set": (set[int], {1, 2}),
    "frozenset": (frozenset[bytes], frozenset({b"\xff"})),
    "tuple": (tuple[int, str, bytes], (1, "a", b"\xff")),
    "enum": (Colour, Colour.RED),
    "str enum": (Word, Word.YES),
    "uuid": (UUID, UUID(int=5)),
    "decimal": (Decimal, Decimal("1.50")),
    "int keys": (dict[int, str], {1: "a"}),
    "bytes keys": (dict[bytes, int], {b"\xff": 1}),
    "date keys": (dict[date, int], {date(2026, 1, 2): 1}),
    "none": (int | None, None),
    "float": (float, float("inf")),
    "large int": (int, 2**64 - 1),
    "nested": (list[Inner], [Inner(b"\xff", datetime(2026, 1, 2, tzinfo=UTC))]),
    "nested state": (dict[str, Room1], {"a": Room1(3)}),
}


@pytest.mark.parametrize(("annotation", "value"), TYPES.values(), ids=TYPES.keys())
def test_types_cross(annotation: Any, value: Any) -> None:
    """A value has the same type and content in the same version, a later and an earlier one."""

    def version(number: int) -> type[Any]:
        made = dataclasses.make_dataclass("State", [("value", annotation)])
        return upgrader.state("x", version=number, readable_from=1)(made)

    for own, other in [(1, 1), (1, 2), (2, 1)]:
        loaded, _ = load(version(other), save(version(own)(value)))

        assert value == loaded.value
        assert type(value) is type(loaded.value)


def test_a_field_that_cannot_be_saved_is_refused_by_name() -> None:
    """The source finds out, not the destination."""

    @upgrader.state("odd")
    class Odd:
        value: Any = None

    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (object(), 2**64, "\ud800", cycle):
        with pytest.raises(UnreadableState, match="'odd': cannot be saved"):
            save(Odd(value))


# Declarations


@pytest.mark.parametrize(
    ("version", "readable_from"), [(0, None), (-1, None), (1, 2), (2, 0), (3, 4)]
)
def test_versions_that_make_no_sense(version: int, readable_from: int | None) -> None:
    """They are refused when declared, with both in the message."""
    with pytest.raises(DeclarationError, match=f"'x'.*version={version}"):
        upgrader.state("x", version=version, readable_from=readable_from)


def test_a_field_of_a_future_version() -> None:
    """A field cannot be newer than its state."""
    with pytest.raises(DeclarationError, match="topic is since 3 > 2"):

        @upgrader.state("x", version=2)
        class X:
            topic: str = upgrader.since(3, default="")


def test_since_needs_a_default() -> None:
    """An older image has no value for it."""
    with pytest.raises(DeclarationError, match="default"):
        upgrader.since(2)


def test_only_declared_classes_are_states() -> None:
    """A plain class is none, and neither is one that only inherits from a state."""

    class Plain:
        pass

    class Heir(Room1):
        extra: int = 0

    for cls in (Plain, Heir, int):
        with pytest.raises(DeclarationError, match=r"is not a state \(add @upgrader.state\)"):
            describe(cls)


def test_a_state_may_inherit_from_a_state() -> None:
    """It is declared anew, with its own name and version."""

    @upgrader.state("hall", version=4)
    class Hall(Room1):
        size: int = 1

    assert (Hall(2, 3), ()) == load(Hall, save(Hall(2, 3)))
    assert ("hall", 4) == (describe(Hall).name, describe(Hall).version)
    assert "room" == describe(Room1).name


# Retiring


def test_a_retired_state_is_read_only() -> None:
    """It can be read and saved; setting a field names it."""
    room = Room1(5)
    retire(room)

    with pytest.raises(Retired, match=r"Room1\.messages"):
        room.messages = 6
    assert 5 == room.messages
    assert Room1 is type(room)
    assert {"messages": 5} == vars(room)
    assert (Room1(5), ()) == load(Room1, save(room))
    retire(room)  # again: no harm


def test_only_the_retired_object_is_read_only() -> None:
    """Others of the class are not."""
    retire(Room1())
    room = Room1()
    room.messages = 1

    assert Room1(1) == room


def test_header_and_encode() -> None:
    """Sessions travel as a header for all, and data for each; no state is no data."""
    assert SavedState("room", 2, 1, b"") == header(Room2)
    assert save(Room2(1)).data == encode(Room2(1))
    assert b"" == encode(None)
