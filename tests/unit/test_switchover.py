# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commit protocol, explored: every order of messages, time-outs, deaths and signals.

The tables explored are the ones that drive the code. Faults (a death, a hang, a signal by hand, a
stop or restart in the middle, an unreadable record) are added one by one, each at every point.
"""

import runpy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.protocol import Model, Rules, Unit, World, verdict, verdict_at_rest
from upgrader.protocol.switchover import (
    DESTINATION,
    SOURCE,
    Destination,
    DestinationAction,
    Event,
    Source,
    SourceAction,
)

#: All pairs of faults, everywhere; every row of the tables is used with one already.
FAULTS = 2

ROOT = Path(__file__).parents[2]
Origins = dict[World, tuple[World, str] | None]


@dataclass(frozen=True)
class Explored:
    """What an exploration has found; it ends at the first thing that is wrong."""

    origins: Origins
    settled: Mapping[World, list[World]]  # what leads to a world without any fault
    at_rest: list[World]
    used: set[tuple[Source | Destination, Event]]
    wrong: str = ""
    where: World | None = None

    @property
    def trace(self) -> str:
        """How it comes to what is wrong, one step a line; a fault is marked."""
        steps: list[str] = []
        origin = self.origins[self.where] if self.where else None
        while origin:
            world, text = origin
            steps.append(text)
            origin = self.origins[world]
        return "\n".join([*reversed(steps), f"=> {self.wrong}"])


def explore(rules: Rules, faults: int = FAULTS) -> Explored:
    """Breadth first, and fewer faults first, so that what is found is as short as can be."""
    model = Model(rules)
    level = [World()]
    origins: Origins = {level[0]: None}
    before: dict[World, list[World]] = {}
    at_rest: list[World] = []
    for allowed in range(faults, -1, -1):
        visited: list[World] = []
        while level:
            visited += level
            following: list[World] = []
            for world in level:
                happens = model.successors(world)
                wrong = verdict(world) or ("" if happens else verdict_at_rest(world))
                if wrong:
                    return Explored(origins, before, at_rest, model.used, wrong, world)
                if not happens:
                    at_rest.append(world)
                for text, reached, _ in happens:
                    before.setdefault(reached, []).append(world)
                    if reached not in origins:
                        origins[reached] = world, text
                        following.append(reached)
            level = following
        for world in visited if allowed else ():
            for text, reached, _ in model.faults(world):
                if reached not in origins:
                    origins[reached] = world, f"! {text}"
                    level.append(reached)
    return Explored(origins, before, at_rest, model.used)


@pytest.fixture(scope="module")
def explored() -> Explored:
    return explore(Rules())


@pytest.fixture(scope="module")
def copied() -> Explored:
    """With tables; one fault, as what comes after the rounds is the same."""
    return explore(Rules(tables=True), faults=1)


def test_there_is_always_one_owner(explored: Explored) -> None:
    """Never do two instances serve; in the end one does, or what it had is in the FD store.

    Nothing that owns is killed by anyone but the one who kills it by hand, and nobody who has seen
    the Ack serves again.
    """
    assert not explored.wrong, explored.trace


def test_everything_comes_to_an_end(explored: Explored) -> None:
    """From wherever a migration has come, it can come to rest: nobody waits for nobody."""
    ending = set(explored.at_rest)
    fresh = set(ending)
    while fresh:
        fresh = {w for world in fresh for w in explored.settled.get(world, ())} - ending
        ending |= fresh

    assert len(ending) == len(explored.origins)


def test_every_row_of_the_tables_is_used(explored: Explored, copied: Explored) -> None:
    """There is no row for what cannot happen."""
    assert explored.used | copied.used == {*SOURCE, *DESTINATION}


def test_rounds_of_tables_change_nothing_for_the_owner(copied: Explored) -> None:
    """The source serves on through all of them, and whatever ends one leaves it as it was."""
    assert not copied.wrong, copied.trace
    assert any(world.source.pieces and world.source.serving for world in copied.at_rest)
    ending = set(copied.at_rest)
    fresh = set(ending)
    while fresh:
        fresh = {w for world in fresh for w in copied.settled.get(world, ())} - ending
        ending |= fresh
    assert len(ending) == len(copied.origins)


@pytest.mark.matrix
def test_rounds_of_tables_with_two_faults() -> None:
    """The same as without tables."""
    found = explore(Rules(tables=True))

    assert not found.wrong, found.trace


def test_the_exploration_reaches_every_outcome(explored: Explored) -> None:
    """Both sides may end as the one that serves, and Restart= finds every kind of image."""
    serving = {(w.source.serving, w.destination.serving) for w in explored.at_rest}
    assert {(True, False), (False, True)} <= serving
    assert {w.pid1.loaded for w in explored.at_rest if w.pid1.unit is Unit.RESTARTED} == {
        "image of the source", "image of the destination", "insurance", "cold",
    }  # fmt: skip
    assert len(explored.origins) > 100_000


def test_without_a_fault_nothing_ever_stops() -> None:
    """Time-outs and refusals alone never cost more than the upgrade."""
    for world in explore(Rules(), faults=0).at_rest:
        assert world.pid1.unit is Unit.RUNNING
        assert world.source.serving != world.destination.serving


def source(
    rows: dict[tuple[Source, Event], tuple[Source, tuple[SourceAction, ...]]],
) -> dict[str, Any]:
    return {"source": {**SOURCE, **rows}}


def without(action: SourceAction) -> dict[str, Any]:
    """The table of the source with one action left out of every row."""
    return source(
        {
            row: (state, tuple(each for each in actions if each is not action))
            for row, (state, actions) in SOURCE.items()
        }
    )


#: What was changed; how; what is wrong then; what somewhere happens on the way there.
BROKEN = [
    pytest.param(
        source({(Source.FROZEN, Event.DEADLINE): (Source.SERVING, (SourceAction.RESUME,))}),
        "the source serves after the commit",
        "source: deadline: frozen -> serving",
        id="an Ack is taken without shutting the channel first",
    ),
    pytest.param(
        {"names_early": True},
        "PID 1 stops the unit, though the source owns and is well",
        "PID 1: takes 'MAINPID' of source",
        id="MAINPID before the Ack",
    ),
    pytest.param(
        {"revokes": False},
        "the destination owns, and is killed by takeover",
        "takeover: kills",
        id="takeover kills without Revoke",
    ),
    pytest.param(
        {"checks_takeover": False},
        "a commit, though takeover had gone before it was decided",
        "takeover: deadline",
        id="the destination does not look for takeover",
    ),
    pytest.param(
        source(
            {
                (state, Event.ACK): (
                    Source.RETIRED,
                    (
                        SourceAction.RETIRE,
                        SourceAction.INSURE,
                        SourceAction.LET_GO,
                        SourceAction.HANG_UP,
                    ),
                )
                for state in (Source.FROZEN, Source.DECIDING)
            }
        ),
        "PID 1 stops the unit, though the destination owns and is well",
        "source: drained: retired -> retired",
        id="the source exits before PID 1 knows its successor",
    ),
    pytest.param(
        {"notify_access": "exec"},
        "stopped for good, and PID 1 keeps the insurance",
        "PID 1: drops 'nothing' of source",
        id="NotifyAccess=exec and two faults: nobody hears a source that is no longer the main",
    ),
    pytest.param(
        {"notify_access": "exec", "stops_with_mainpid": False},
        "connections are lost, though no owner died",
        "! systemctl restart",
        id="NotifyAccess=exec with systemd 252, restarted between the Ack and MAINPID",
    ),
    pytest.param(
        {"notify_access": "exec", "names_for_the_dead": False},
        "the destination serves, and is not PID 1's main process",
        "! source is killed",
        id="NotifyAccess=exec, and takeover does not name the destination of a dead source",
    ),
    pytest.param(
        {"notify_access": "exec", "waits_to_be_main": False},
        "PID 1 keeps the insurance, older than what is served",
        "destination: gives up the insurance",
        id="NotifyAccess=exec, and the owner notifies before it is the main process",
    ),
    pytest.param(
        {"notify_access": "exec", "reads_on": False},
        "everything is lost",
        "takeover: deadline",
        id="NotifyAccess=exec, and takeover hears nothing after its deadline",
    ),
    pytest.param(
        {"waits_for_the_end": False},
        "the source serves after the commit",
        "destination: orphaned: asking -> owner",
        id="a destination whose Ack was not taken takes the source for dead",
    ),
    pytest.param(
        without(SourceAction.TAKE_BACK),
        "what is served is older than what was served",
        "destination: orphaned: asking -> owner",
        id="a source that resumes does not take its image back",
    ),
    pytest.param(
        {"looks_again": False},
        "stopped for good, and PID 1 keeps the insurance",
        "! destination is killed",
        id="the source does not look whether the destination lived to be named",
    ),
    pytest.param(
        {"names_until_answered": False},
        "PID 1 keeps the insurance, older than what is served",
        "source: stays, quiesced",
        id="the source gives up naming its successor",
    ),
    pytest.param(
        source({(Source.FROZEN, Event.UNREADABLE): (Source.SERVING, (SourceAction.RESUME,))}),
        "the source serves after the commit",
        "! destination: sends junk",
        id="the source resumes at an unreadable record",
    ),
    pytest.param(
        source({(Source.DECIDING, Event.UNREADABLE): (Source.SERVING, (SourceAction.RESUME,))}),
        "the source serves after the commit",
        "source: unreadable: deciding -> serving",
        id="the source reads no further than an unreadable record",
    ),
    pytest.param(
        {"waits_for_source": False},
        "PID 1 keeps the insurance, older than what is served",
        "destination: gives up the insurance",
        id="the owner gives up the insurance while the source may still park it",
    ),
    pytest.param(
        {"asks_for_job": False},
        "stopped for good, and PID 1 keeps the image of the source, insurance",
        "! systemctl stop",
        id="a source left alone parks on a stop for good",
    ),
    pytest.param(
        source(
            {(Source.COMMITTED, Event.SUCCESSOR_DEAD): (Source.SERVING, (SourceAction.RESUME,))}
        ),
        "the source serves with what has moved",
        "! destination is killed",
        id="the source serves again after the Ack",
    ),
    pytest.param(
        without(SourceAction.INSURE),
        "everything is lost",
        "! destination is killed",
        id="no insurance",
    ),
    pytest.param(
        {
            "destination": {
                **DESTINATION,
                (Destination.LOADING, Event.LOADED): (
                    Destination.ACKING,
                    (DestinationAction.SERVE, DestinationAction.SEND_ACK),
                ),
            }
        },
        "two owners serve",
        "destination: serve",
        id="the destination serves before the Ack",
    ),
    pytest.param(
        {"checks_ack": False},
        "the source commits, and nobody owns",
        "! destination: sends ack of nothing",
        id="an Ack of nothing commits",
    ),
    pytest.param(
        without(SourceAction.RETIRE),
        "the source touches what has moved",
        "destination: send-ack: taken: acking -> owner",
        id="the source does not retire",
    ),
    pytest.param(
        without(SourceAction.LET_GO),
        "the source keeps open what has moved",
        "source: named: committed -> retired",
        id="the source does not let go",
    ),
]


@pytest.mark.parametrize(("change", "wrong", "step"), BROKEN)
def test_a_broken_rule_is_found_out(change: dict[str, Any], wrong: str, step: str) -> None:
    """Each rule is needed: without it the exploration finds the way into the damage."""
    found = explore(replace(Rules(), **change))

    assert found.wrong == wrong, found.trace
    assert any(step in line for line in found.trace.splitlines()), found.trace


def test_notify_access_exec_is_enough_for_one_fault() -> None:
    """Only with NotifyAccess=all two processes may be killed in the wrong instant."""
    found = explore(Rules(notify_access="exec"), faults=1)

    assert not found.wrong, found.trace


def test_an_older_systemd_is_as_safe_with_notify_access_all() -> None:
    """252 takes no MAINPID= of a unit that stops: with NotifyAccess=all nothing depends on that."""
    found = explore(Rules(stops_with_mainpid=False), faults=1)

    assert not found.wrong, found.trace


def test_a_dead_source_loses_nothing_once_its_image_is_out(explored: Explored) -> None:
    """The destination then owns, parks when PID 1 ends the unit for that, and is started again."""
    assert (Destination.ASKING, Event.ORPHANED) in explored.used
    assert any(
        w.pid1.loaded == "image of the destination" and "source killed as the owner" in w.history
        for w in explored.at_rest
    )


def test_the_diagrams_show_the_tables() -> None:
    """Those in docs/live.md are written by packaging/live-diagrams, and nobody forgot to."""
    script = runpy.run_path(str(ROOT / "packaging" / "live-diagrams"))
    page = (ROOT / "docs" / "live.md").read_text()

    assert script["filled"](page) == page
    assert f"{Destination.ACKING} --> {Destination.OWNER}: {Event.TAKEN}" in page


def test_a_counter_example_can_be_read() -> None:
    """What is found is told step by step, as short as it can be, the fault marked."""
    found = explore(Rules(notify_access="exec"))

    assert found.trace.splitlines()[-8:] == [
        "! systemctl stop",
        "source: asks PID 1 to keep nothing",
        "PID 1: drops 'nothing' of source",
        "source: PID 1 has answered",
        "source: exits",
        "PID 1: source has ended",
        "PID 1: destination has ended",
        "=> stopped for good, and PID 1 keeps the insurance",
    ]
