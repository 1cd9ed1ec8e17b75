# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types of fields: a value crosses as it is, and one that cannot be saved is found."""

import dataclasses
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import pytest

import upgrader
from tests.unit.states import Job, Room1
from upgrader.errors import UnsavableState
from upgrader.protocol.state_codec import load, save


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

    for value in (object(), 2**64, "\ud800", cycle()):
        with pytest.raises(UnsavableState, match="state 'odd' cannot be saved: value"):
            save(Odd(value))


def cycle() -> list[Any]:
    around: list[Any] = []
    around.append(around)
    return around


HIDDEN: dict[str, tuple[Any, str]] = {
    "task in a dict": ({"a": Job("x", object())}, "value['a'].note: "),
    "list": ([1, (2, object())], "value[1][1]: "),
    "key": ({object(): 1}, "value[key]: "),
    "value of a key without a name": ({(1, 2): object()}, "value[tuple]: "),
    "long key": ({"k" * 500: len}, "value['" + "k" * 39 + "...]: "),
    "set": ({len}, "value[0]: "),
    "itself": (cycle(), "value[0]: "),
}


@pytest.mark.parametrize(("value", "path"), HIDDEN.values(), ids=HIDDEN.keys())
def test_p5_what_cannot_be_saved_is_found_at_any_depth(value: Any, path: str) -> None:
    """The message has the path to it: the annotation did not tell."""

    @upgrader.state("odd")
    class Odd:
        first: int = 0
        value: Any = None

    with pytest.raises(UnsavableState) as caught:
        save(Odd(1, value))

    assert "state 'odd'" == caught.value.item
    assert caught.value.reason.startswith(path)
