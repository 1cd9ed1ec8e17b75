# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions of a state: which one loads what another has saved, and what is refused."""

import msgspec
import pytest

import upgrader
from tests.unit.states import Room1, Room2, Room3
from upgrader.errors import IncompatibleState, UnreadableState
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import check_readable, describe
from upgrader.protocol.state_codec import encode, header, load, save


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


def test_p6_the_version_rule() -> None:
    """What is newer and says no version as old as ours can read it: the one place for all."""
    for version, readable_from in [(1, 1), (2, 2), (3, 2), (3, 1)]:
        check_readable("x", version, readable_from, own=2)
    with pytest.raises(IncompatibleState, match=r"'x'.*version 3.*version 2"):
        check_readable("x", 3, 3, own=2)


def test_header_and_encode() -> None:
    """Sessions travel as a header for all, and data for each; no state is no data."""
    mark = describe(Room2).shape.mark
    assert SavedState("room", 2, 1, b"", shape=mark) == header(Room2)
    assert save(Room2(1)).data == encode(Room2(1))
    assert b"" == encode(None)
