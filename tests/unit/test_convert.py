# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converters: a state in the form of another version, there and back."""

import dataclasses
from datetime import date
from typing import Any

import msgspec
import pytest

import upgrader
from tests.unit.states import Room2, Room3
from upgrader.errors import DeclarationError, UnreadableState, UnsavableState
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import convert_for, load, save

# Converting


def renamed() -> type[Any]:
    @upgrader.state("house", version=3)
    class House:
        people: int = 0
        built: date = upgrader.since(3, default=date(1900, 1, 1))

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
    assert (cls(people=6), ()) == load(cls, house(3, people=6, built=date(1900, 1, 1)))


def test_a_version_that_there_is_not_takes_no_time() -> None:
    """All converters there are come before it, however long ago it was."""
    cls = renamed()
    assert (cls(people=4), ()) == load(cls, house(-(2**62), count=4))


def test_converters_may_return_objects() -> None:
    """What a converter returns is encoded like a state."""
    cls = renamed()
    upgrader.convert(cls, 2)(lambda fields: {"people": 0, "built": date(2000, 1, 2)})

    assert cls(0, date(2000, 1, 2)) == load(cls, house(2))[0]


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (lambda fields: None, "the converter from 1 has returned NoneType, not a dict"),
        (lambda fields: fields.popitem()[9], "IndexError"),
    ],
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


# Converting back


def kv(version: int) -> type[Any]:
    """Version 2 renames a field, version 3 adds one, version 4 retypes one."""
    fields: dict[int, list[Any]] = {
        1: [("commands", int, 0)],
        2: [("executed", int, 0)],
        3: [("executed", int, 0), ("note", str, upgrader.since(3, default=""))],
        4: [("executed", str, "0"), ("note", str, upgrader.since(3, default=""))],
    }
    made = dataclasses.make_dataclass("Kv", fields[version])
    cls: type[Any] = upgrader.state("kv", version=version, readable_from=1)(made)
    if version > 1:
        upgrader.convert(cls, 1)(lambda f: {"executed": f["commands"]})
        upgrader.convert_back(cls, 1)(
            lambda f: {"commands" if k == "executed" else k: v for k, v in f.items()}
        )
    if version > 3:
        upgrader.convert(cls, 3)(lambda f: {**f, "executed": str(f["executed"])})
        upgrader.convert_back(cls, 3)(lambda f: {**f, "executed": int(f["executed"])})
    return cls


VALUES = {1: (6,), 2: (6,), 3: (6, "n"), 4: ("6", "n")}


@pytest.mark.parametrize("old", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 4])
@pytest.mark.parametrize("known", [True, False])
def test_p6_a_renamed_field_goes_both_ways(new: int, old: int, known: bool) -> None:
    """Between any two versions, whether the source knows who reads it (live) or not (restart)."""
    source, destination = kv(new), kv(old)
    saved = convert_for(source, save(source(*VALUES[new])), old if known else None)
    value, dropped = load(destination, saved)

    loses = new > 2 > old or (new > 2 and old == 2)
    assert destination(*(VALUES[old] if new > 2 else (VALUES[old][0],))) == value
    assert (("note",) if loses else ()) == dropped


def test_p6_only_forms_that_differ_are_made() -> None:
    """One for each converter; none for a reader that needs none, or if there is no converter."""
    cls = kv(4)
    plain = save(cls("6", "n"))
    everything = convert_for(cls, plain, None)

    assert everything.earlier
    assert [3, 1] == list(everything.earlier)
    assert plain.data == everything.data
    assert plain is convert_for(cls, plain, 4)
    assert plain is convert_for(cls, plain, 5)
    assert 3 == convert_for(cls, plain, 3).version == convert_for(cls, plain, 2).version
    assert 1 == convert_for(cls, plain, 1).version
    room = save(Room2(1))
    assert room is convert_for(Room2, room, None)


def test_p6_version_0_1_0_reads_what_was_made_for_it() -> None:
    """A live source gives it the older fields under the older version, in the older format."""
    cls = kv(2)
    saved = convert_for(cls, save(cls(6)), 1)

    assert {
        "name": "kv", "version": 1, "readable_from": 1, "shape": 0,
        "data": msgspec.msgpack.encode({"commands": 6}),
    } == msgspec.to_builtins(saved, builtin_types=(bytes,))  # fmt: skip


@pytest.mark.parametrize(
    ("converter", "message"),
    [(lambda fields: None, "TypeError: returned NoneType"), (lambda fields: fields[9], "KeyError")],
)
def test_p6_a_converter_back_that_fails_is_named(converter: Any, message: str) -> None:
    """It is the source's own fault: the message names state and version."""
    cls = kv(2)
    upgrader.convert_back(cls, 1)(converter)

    with pytest.raises(UnsavableState, match=f"'kv' .*back to version 1: {message}"):
        convert_for(cls, save(cls(6)), None)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_p6_only_to_older_versions_can_be_converted_back(version: int) -> None:
    """There is nothing to convert to the present version or a later one."""
    with pytest.raises(DeclarationError, match=f"'kv'.*convert back to {version}"):
        upgrader.convert_back(kv(2), version)


def test_p6_a_version_that_may_not_read_it_needs_no_converter() -> None:
    """It would never be asked for."""
    with pytest.raises(DeclarationError, match=r"version 1 does not read it: readable_from=3"):
        upgrader.convert_back(Room3, 1)
