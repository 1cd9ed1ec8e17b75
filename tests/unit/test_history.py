# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events from the journal, whatever is in there, and the picture of them."""

import json
from xml.etree import ElementTree

import pytest

from upgrader.instance.phases import Phases, fields
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Migration
from upgrader.tool.history import HistoryEvent, agreed, parse
from upgrader.tool.history_svg import plot

ENTRY = {
    "__REALTIME_TIMESTAMP": "1700000000000000",
    "MESSAGE": "replaced",
    "UPGRADER_GENERATION": "3",
    "UPGRADER_SIDE": "source",
    "UPGRADER_PHASE": "migrate",
    "UPGRADER_OUTCOME": "done",
}


def test_what_is_written_is_read_again() -> None:
    """The numbers of a migration cross the journal."""
    progress = Phases()
    progress.begin("live", 3, destination=4)
    progress.enter(Phase.FROZEN, fds=2)
    progress.enter(Phase.DONE, pause=0.001)
    written = {f"UPGRADER_{name}": value for name, value in fields(progress.now).items()}

    (event,) = parse([json.dumps({**ENTRY, **written})])

    assert ("live", 3, 4, 2, 0.001) == (
        event.mode, event.source, event.destination, event.fds, event.pause,
    )  # fmt: skip
    assert ["setup", "frozen"] == [name for name, _ in event.times]
    assert event.seconds == progress.now.seconds > 0


def test_s3_one_upgrade_has_one_pause() -> None:
    """The source knows only when it has given everything away."""
    source, destination = (
        HistoryEvent(1.0, 3, "source", "migrate", "done", "", pause=0.01, id="a"),
        (HistoryEvent(1.0, 4, "destination", "load", "done", "", pause=0.02, id="a")),
    )
    alone = HistoryEvent(2.0, 4, "source", "migrate", "failed", "", pause=0.03, id="b")

    assert [0.02, 0.02, 0.03] == [each.pause for each in agreed([source, destination, alone])]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[]",
        "{}",
        json.dumps({**ENTRY, "UPGRADER_GENERATION": "x"}),
        json.dumps({**ENTRY, "__REALTIME_TIMESTAMP": ""}),
        json.dumps({**ENTRY, "UPGRADER_TIMES": "frozen"}),
        json.dumps({**ENTRY, "UPGRADER_FDS": "9" * 400}),
        json.dumps({**ENTRY, "UPGRADER_FDS": "²"}),
        json.dumps({**ENTRY, "UPGRADER_FDS": "-1"}),
        json.dumps({**ENTRY, "UPGRADER_SECONDS": "nan"}),
        json.dumps({**ENTRY, "UPGRADER_SECONDS": "1e999"}),
        json.dumps({**ENTRY, "UPGRADER_TIMES": "frozen=-inf"}),
        "[" * 100_000,
    ],
)
def test_what_is_no_event_is_skipped(line: str) -> None:
    """Anybody may write anything into the journal."""
    assert [] == list(parse([line]))


def test_the_picture_is_of_this_world() -> None:
    """It is well-formed, whatever a service has said, and a phase of a millisecond can be seen."""
    times = (("setup", 10.0), ("frozen", 0.001))
    told = HistoryEvent(1.0, 1, "source", "migrate", "failed", "<&\x1b[2J\x00>\nmore", "live", 1, 2,
                 times=times)  # fmt: skip
    nothing = HistoryEvent(1.0, 1, "takeover", "upgrade", "failed", "no")
    svg = "{http://www.w3.org/2000/svg}"

    root = ElementTree.fromstring(plot("a<b.service", [told, nothing]))

    labels = [each.text or "" for each in root.iter(f"{svg}text")]
    assert "Upgrades of a<b.service" in labels
    assert r"<&\x1b[2J\x00>" in labels
    bars = [each for each in root.iter(f"{svg}rect") if each.find(f"{svg}title") is not None]
    assert ["setup 10.00 s", "frozen 1.0 ms"] == [each[0].text for each in bars]
    assert all(float(each.get("width", "0")) >= 2 for each in bars)


def test_a_picture_of_nothing() -> None:
    """No upgrades are a picture, too."""
    assert "Upgrades of x" in plot("x", [])


def test_phases_and_their_times() -> None:
    """A phase that has ended has its time; nothing is counted twice, and a late word is ignored."""
    progress = Phases()
    assert Migration() == progress.now
    progress.enter(Phase.FROZEN)
    assert Migration() == progress.now
    progress.begin("live", 1)
    progress.enter(Phase.FAILED, reason="no")
    progress.enter(Phase.DONE)

    assert (Phase.FAILED, "no", ["setup"]) == (
        progress.now.phase,
        progress.now.reason,
        list(progress.now.times),
    )
    assert progress.now == progress.now
    progress.begin("live", 1)
    assert ("", {}) == (progress.now.reason, progress.now.times)
