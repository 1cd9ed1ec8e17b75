# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events from the journal, whatever is in there, and the picture of them."""

import json
import math
import time
from xml.etree import ElementTree

import pytest

from upgrader.cli.history_dump import recounted
from upgrader.cli.screen import Screen
from upgrader.instance.phases import Phases, fields
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Migration
from upgrader.tool.history import HistoryEvent, PastResult, agreed, parse, upgrades
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


def many(count: int) -> list[HistoryEvent]:
    """Events of all kinds that stay without their other half, or have many of one name."""
    kinds = (
        ("source", "park", "done", ""),
        ("source", "migrate", "failed", "one"),
        ("takeover", "upgrade", "failed", ""),
        ("destination", "attach", "failed", ""),
        ("destination", "load", "done", "other"),
    )
    events = []
    for number in range(count):
        side, phase, outcome, name = kinds[number % len(kinds)]
        at = number % 3
        events.append(HistoryEvent(number, at, side, phase, outcome, "", source=9, id=name, pid=at))
    return events


def test_a_long_history_takes_time_by_its_length() -> None:
    """Ten times the entries take about ten times as long, whatever they are."""

    def took(count: int) -> float:
        events, best = many(count), math.inf
        for _ in range(3):
            began = time.process_time()
            past = upgrades(events)
            plot("web.service", past)
            recounted(Screen(), past)
            best = min(best, time.process_time() - began)
        assert count == sum(len(each.events) for each in past)
        return best

    assert took(5000) < 20 * took(500)


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

    root = ElementTree.fromstring(plot("a<b.service", upgrades([told, nothing])))

    labels = [each.text or "" for each in root.iter(f"{svg}text")]
    assert "Upgrades of a<b.service" in labels
    assert r"failed: <&\x1b[2J\x00>" in labels
    bars = [each for each in root.iter(f"{svg}rect") if each.find(f"{svg}title") is not None]
    assert ["setup 10s", "frozen 1ms"] == [each[0].text for each in bars]
    assert all(float(each.get("width", "0")) >= 2 for each in bars)


def test_a_picture_of_nothing() -> None:
    """No upgrades are a picture, too."""
    assert "Upgrades of x" in plot("x", [])


def test_n7_a_picture_has_round_ticks_and_a_size_and_all_that_failed() -> None:
    """Also what failed before anything moved. A restart's pause does not look like a freeze."""
    times = (("setup", 0.3117), ("frozen", 0.001))
    past = upgrades(
        [
            HistoryEvent(1.0, 1, "source", "migrate", "failed", "x", "live", 1, 2, times=times,
                         reason="not with me"),
            HistoryEvent(2.0, 1, "takeover", "upgrade", "failed", "x", reason="no room"),
            HistoryEvent(3.0, 2, "destination", "load", "done", "x", "restart", 1, 2, pause=0.25),
        ]
    )  # fmt: skip
    picture = plot("web.service", past)
    root = ElementTree.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    words = [each.text or "" for each in root.iter(f"{svg}text")]

    assert ["0", "100ms", "200ms", "300ms", "400ms"] == [
        each.text for each in root.iter(f"{svg}text") if each.get("class") == "axis"
    ]
    assert {"failed: not with me", "failed: no room", "paused 250ms, 0 FDs"} < set(words)
    assert (root.get("viewBox") or "").split()[2:] == [root.get("width"), root.get("height")]
    colours = {
        (each[0].text or "").split()[0]: each.get("fill")
        for each in root.iter(f"{svg}rect")
        if len(each)
    }
    assert colours["frozen"] != colours["paused"]


# What belongs together


def test_n6_one_pause_everywhere() -> None:
    """It is over when the new instance is ready, and that one knows it, whoever asks."""
    source = HistoryEvent(
        2.0, 1, "source", "migrate", "done", "", "live", 1, 2, pause=0.003, id="a"
    )
    loaded = HistoryEvent(
        1.9, 2, "destination", "load", "done", "", "live", 1, 2, pause=0.004, id="a"
    )

    for events in ([source, loaded], [loaded, source]):
        (one,) = upgrades(events)
        assert (0.004, PastResult.DONE, "1 -> 2") == (one.pause, one.result, one.generations("->"))


@pytest.mark.parametrize(
    ("code", "outcome", "preflight", "kind", "result"),
    [
        ("preflight-passed", "done", True, "preflight", PastResult.PASSED),
        ("verify-failed", "failed", True, "preflight", PastResult.FAILED),
        ("verify-failed", "failed", False, "live", PastResult.FAILED),
        ("cancelled", "failed", False, "live", PastResult.CANCELLED),
    ],
)
def test_n6_preflights_and_failures_are_told_apart(
    code: str, outcome: str, preflight: bool, kind: str, result: PastResult
) -> None:
    """By facts; takeover's entry is of the same upgrade."""
    source = HistoryEvent(
        1.0, 1, "source", "migrate", outcome, "x", "live", 1, 2, id="a", code=code, reason="why",
        preflight=preflight,
    )  # fmt: skip
    takeover = HistoryEvent(1.1, 1, "takeover", "upgrade", "failed", "y", id="a", code=code)

    for events in ([source], [source, takeover]):
        (one,) = upgrades(events)
        assert (kind, result, "1", "why") == (
            one.kind, one.result, one.generations("->"), one.reason,
        )  # fmt: skip


def test_n6_the_halves_of_a_restart_are_one_upgrade() -> None:
    """Neither knows an id; a version that could not load it comes between them."""
    parked = HistoryEvent(1.0, 3, "source", "park", "done", "generation 3 parked: 2 FDs")
    failed = HistoryEvent(2.0, 0, "destination", "load", "failed", "failed to load: no")
    loaded = HistoryEvent(3.0, 4, "destination", "load", "done", "", "restart", 3, 4, pause=2.0)
    cold = HistoryEvent(4.0, 1, "destination", "load", "done", "generation 1, cold start")

    bad, good, start = upgrades([parked, failed, loaded, cold])

    assert ("restart", PastResult.FAILED) == (bad.kind, bad.result)
    assert ("restart", PastResult.DONE, "3 -> 4", 2.0) == (
        good.kind, good.result, good.generations("->"), good.pause,
    )  # fmt: skip
    assert ("start", "1") == (start.kind, start.generations("->"))
    ended = HistoryEvent(1.5, 3, "source", "children", "done", "generation 3 has ended 2 processes")
    assert 1 == len(upgrades([ended, loaded]))
    (alone,) = upgrades([parked, ended])
    assert PastResult.PARKED is alone.result


def test_n6_a_version_that_fails_before_it_loads_is_one_failure() -> None:
    """It knows no generation and no id; its process tells to which upgrade it belongs."""
    live = HistoryEvent(2.0, 3, "source", "migrate", "failed", "", "live", 3, 4, id="a", pid=7)
    attach = HistoryEvent(1.9, 0, "destination", "attach", "failed", "web: no", pid=7)
    load = HistoryEvent(1.8, 0, "destination", "load", "failed", "failed to load: no", pid=7)
    other = HistoryEvent(2.5, 0, "destination", "attach", "failed", "web: no", pid=8)

    takeover = HistoryEvent(2.1, 3, "takeover", "upgrade", "failed", "no", id="a")
    for events in ([attach, live, takeover, other], [live, takeover, attach, other]):
        assert ["live", "restart"] == [each.kind for each in upgrades(events)]
    assert ["restart"] == [each.kind for each in upgrades([load, attach])]
    raw = {**ENTRY, "_PID": "5", "UPGRADER_PID": "7"}
    pids = [
        next(parse([json.dumps({**raw, "UPGRADER_SIDE": side})])).pid
        for side in ("source", "destination", "takeover")
    ]
    assert [7, 5, 0] == pids


def test_n6_a_preflight_is_no_upgrade() -> None:
    """What was upgraded last stays known, whether the preflight passes or not."""
    progress = Phases()
    progress.begin("live", 1)
    progress.enter(Phase.DONE)
    upgraded = progress.now
    for end in (Phase.PREFLIGHT, Phase.FAILED):
        progress.begin("live", 2, preflight=True)
        progress.enter(end, reason="why")
        assert (end, True) == (progress.now.phase, progress.now.preflight)
        assert upgraded == progress.last_upgrade
        assert {"PREFLIGHT": "1", "REASON": "why"}.items() <= fields(progress.now).items()
    progress.begin("live", 2)
    progress.enter(Phase.CANCELLED)
    assert upgraded == progress.last_upgrade
    progress.begin("live", 2)
    progress.enter(Phase.FAILED)
    assert progress.now == progress.last_upgrade


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
