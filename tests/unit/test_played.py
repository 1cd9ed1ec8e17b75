# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interpreters do what the exploration has proved: its paths are played over real sockets.

Whatever the code leaves out is found out by the same paths: a row of a table, an action, the look
at what an Ack acknowledges.
"""

from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest

from tests.unit.paths import Path, paths, walk
from tests.unit.played import Credulous, Play
from tests.unit.protocol import Rules
from upgrader.protocol.switchover import (
    DESTINATION,
    SOURCE,
    Destination,
    DestinationAction,
    Event,
    Source,
    SourceAction,
)

WALKS = 100
#: What a side raises that has left the path, or cannot go on.
WRONG = (AssertionError, KeyError, OSError, FutureTimeoutError)

#: Where a source stands up to the end of its rounds; what follows is the same without tables.
_COPYING = (Source.SERVING, Source.COPYING)

Paths = dict[tuple[object, ...], Path]


@pytest.fixture(scope="module")
def all_paths() -> Paths:
    copying = paths(Rules(tables=True), lambda world: world.source.at in _COPYING)
    return {**copying, **paths(Rules())}


def play(path: Path, **changes: Any) -> None:
    with Play(**changes) as migration:
        try:
            migration.run(path)
        except WRONG as error:
            for move in path:
                for text in move.texts:
                    error.add_note(text)
            raise


def is_found_out(all_paths: Paths, **changes: Any) -> bool:
    """Whether one of the paths cannot be played any more."""
    for path in all_paths.values():
        try:
            play(path, **changes)
        except WRONG:
            return True
    return False


def test_every_row_is_on_a_path(all_paths: Paths) -> None:
    """Each reachable step of either side is played at least once."""
    rows: set[tuple[Source | Destination, Event]] = set()
    for path in all_paths.values():
        with Play() as migration:
            for move in path:
                for who, what in move.rows:
                    side = (
                        migration.live_source.side
                        if who == "source"
                        else migration.live_destination.side
                    )
                    rows.add((side.state, Event(what)))
                    side.state = (SOURCE if who == "source" else DESTINATION)[
                        side.state, Event(what)
                    ][0]

    assert rows == {*SOURCE, *DESTINATION}


def test_each_step_is_played(all_paths: Paths) -> None:
    """In each pair of states of both sides, for each way in which its actions may end: the sides
    stand where the model does, one of them serves, and what it owns is open and works."""
    for path in all_paths.values():
        play(path)


def test_random_walks_are_played() -> None:
    """To wherever they lead, with any number of faults."""
    for seed in range(WALKS):
        play(walk(Rules(tables=seed % 4 == 0), seed))


# What must be found out


@pytest.mark.parametrize("row", [*SOURCE, *DESTINATION], ids="-".join)
def test_a_row_taken_out_is_found_out(row: Any, all_paths: Paths) -> None:
    """The code has no step of its own that a table does not name."""
    source = {each: then for each, then in SOURCE.items() if each != row}
    destination = {each: then for each, then in DESTINATION.items() if each != row}

    assert is_found_out(all_paths, source=source, destination=destination)


@pytest.mark.parametrize(
    "action",
    [f"source.{each.name.lower()}" for each in SourceAction]
    + [f"destination.{each.name.lower()}" for each in DestinationAction],
)
def test_an_action_not_performed_is_found_out(action: str, all_paths: Paths) -> None:
    """Each is needed, and is seen to be done."""
    assert is_found_out(all_paths, omit=action)


def test_a_take_back_left_out_is_found_out(all_paths: Paths) -> None:
    """A row that lets the source serve again must say first that its image is worth nothing."""
    for row, (state, actions) in SOURCE.items():
        if SourceAction.TAKE_BACK in actions:
            less = tuple(each for each in actions if each is not SourceAction.TAKE_BACK)

            assert is_found_out(all_paths, source={**SOURCE, row: (state, less)})


def test_an_ack_sent_too_early_is_found_out(all_paths: Paths) -> None:
    """A source that takes any Ack for the commit leaves the path."""
    assert is_found_out(all_paths, live_source=Credulous)


def test_an_ack_of_nothing_is_on_a_path(all_paths: Paths) -> None:
    """Also after the image could not be sent."""
    early = {
        path[-1].world.source.at
        for path in all_paths.values()
        if any(op.who == "sends" and op.what == "ack of nothing" for m in path for op in m.ops)
    }

    assert {Source.DECIDING} <= early
