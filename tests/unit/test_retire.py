# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retired states: what a source has saved changes no more."""

import pytest

from tests.unit.states import Room1
from upgrader.errors import Retired
from upgrader.protocol.state import retire
from upgrader.protocol.state_codec import load, save


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
