# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance keeps of its last upgrade: how it was decided, and for whom it is kept."""

import threading

import pytest

from tests.support import SETTLE
from upgrader.codes import Code
from upgrader.instance.phases import News, Phases
from upgrader.protocol.phase import Decision, Phase
from upgrader.protocol.varlink_types import Loaded, Migration
from upgrader.tool.course import show_times

ID, OTHER = "0" * 32, "1" * 32


@pytest.fixture
def phases() -> Phases:
    """Of a source, at the beginning of an upgrade."""
    made = Phases()
    made.begin("live", 3, upgrade=ID, destination=4)
    return made


def test_it_is_not_decided_before_it_is(phases: Phases) -> None:
    """As far as the image is on its way."""
    for phase in (Phase.COLLECTING, Phase.FROZEN, Phase.LOADING):
        assert (ID, "source", Decision.NONE, "") == (
            phases.last.id, phases.last.side, phases.last.decision, phases.last.code,
        )  # fmt: skip
        phases.enter(phase)
    assert Decision.NONE is phases.last.decision


@pytest.mark.parametrize(
    ("phase", "code", "decision"),
    [
        (Phase.COMMITTED, None, Decision.COMMITTED),
        (Phase.FAILED, Code.VERIFY_FAILED, Decision.ABORTED),
        (Phase.CANCELLED, Code.CANCELLED, Decision.ABORTED),
        (Phase.PREFLIGHT, Code.PREFLIGHT_PASSED, Decision.ABORTED),
    ],
)
def test_what_is_decided_first_stays(
    phases: Phases, phase: Phase, code: Code | None, decision: Decision
) -> None:
    """With its code, whatever is said afterwards; only a commit goes on, and ends."""
    phases.enter(phase, code=code, reason="why")
    for later in (Phase.FAILED, Phase.DONE) if decision is Decision.ABORTED else (Phase.DONE,):
        phases.enter(later, code=Code.UNKNOWN if later is Phase.FAILED else None)

    last = phases.last
    assert (decision, code or "", "why") == (last.decision, last.code, last.reason)


def test_a_destination_keeps_how_it_came_to_be() -> None:
    """Also when it is the source of the next upgrade."""
    phases = Phases()
    loaded = Loaded("live", 3, 5, 100, 1, 0, 0.2)
    phases.loaded(loaded, Migration(Phase.DONE, "live", 3, 4, pause=0.2), ID)
    assert (ID, "destination", Decision.COMMITTED, 0.2) == (
        phases.last.id, phases.last.side, phases.last.decision, phases.last.pause,
    )  # fmt: skip

    phases.begin("live", 4, upgrade=OTHER)

    assert (OTHER, "source", loaded) == (phases.last.id, phases.last.side, phases.origin)


@pytest.mark.parametrize("how", ["decided", "another"])
def test_who_waits_is_told(phases: Phases, how: str) -> None:
    """Once it is decided, or another upgrade has begun; and at once, if it is already."""
    told = []
    thread = threading.Thread(target=lambda: told.append(phases.wait_decided(ID, SETTLE)))
    thread.start()
    phases.enter(Phase.FROZEN)
    if how == "decided":
        phases.enter(Phase.FAILED, code=Code.ENDED_EARLY)
    else:
        phases.begin("live", 3, upgrade=OTHER)
    thread.join(SETTLE)

    assert not thread.is_alive()
    assert [phases.last] == told
    assert phases.last == phases.wait_decided(ID, SETTLE)


def test_nobody_waits_for_longer_than_he_wants(phases: Phases) -> None:
    """The answer is that it is not decided."""
    assert Decision.NONE is phases.wait_decided(ID, 0.01).decision


def test_r21_each_try_is_news_and_their_times_are_one() -> None:
    """The phase has taken as long as all of its tries."""
    progress, told = Phases(), list[News]()
    progress.on_change(told.append)
    progress.begin("live", 1)
    progress.enter(Phase.COLLECTING)
    progress.again()
    first = told[-1].migration.times[Phase.COLLECTING]
    progress.enter(Phase.FROZEN)

    tried = [Phase.SETUP, Phase.COLLECTING, Phase.COLLECTING, Phase.FROZEN]
    assert tried == [each.migration.phase for each in told]
    assert progress.now.times[Phase.COLLECTING] > first > 0


def test_where_the_time_went() -> None:
    """Each part says what it was needed for; one of a later version goes by its name."""
    times = {"asked": 0.018, "takeover": 0.041, Phase.SETUP: 0.076, Phase.FROZEN: 2e-4, "more": 1.0}
    wanted = "18ms to ask systemd, 41ms for takeover, 76ms to start the new version, 200us to save"
    assert f"time: {wanted}, 1s more" == show_times(times)
