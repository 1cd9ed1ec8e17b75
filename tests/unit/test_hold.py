# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hold that a failed upgrade leaves."""

from pathlib import Path

import pytest

from upgrader import hold
from upgrader.hold import Hold, HoldError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "upgrader" / "hold"


def test_a_hold_is_kept_until_it_is_lifted() -> None:
    """What was placed is read again, by unit and in the list, and lifted once."""
    placed = Hold.now("web.service", "version 3 refused: not with me")

    hold.place(placed, user=True)

    assert placed == hold.read("web.service", user=True)
    assert [placed] == hold.held(user=True)
    assert hold.read("other.service", user=True) is None
    assert hold.lift("web.service", user=True)
    assert not hold.lift("web.service", user=True)
    assert [] == hold.held(user=True)


def test_a_newer_hold_replaces_an_older_one(state: Path) -> None:
    """One file a unit, and nothing half-written beside it."""
    for cause in ("first", "second"):
        hold.place(Hold.now("web.service", cause), user=True)

    assert ["web.service"] == [path.name for path in state.iterdir()]
    found = hold.read("web.service", user=True)
    assert found is not None
    assert "second" == found.cause


def test_a_damaged_hold_still_holds(state: Path) -> None:
    """Somebody put it there, so nothing is restarted because it cannot be read."""
    state.mkdir(parents=True)
    (state / "web.service").write_text("{")

    found = hold.read("web.service", user=True)

    assert found is not None
    assert "cannot be read" in found.cause


def test_a_hold_that_cannot_be_written_says_so(state: Path) -> None:
    """The error names the unit and what to do meanwhile."""
    state.parent.mkdir(parents=True)
    state.write_text("in the way")

    with pytest.raises(HoldError, match=r"web\.service.*do not let anything restart it"):
        hold.place(Hold.now("web.service", "cause"), user=True)
    with pytest.raises(HoldError, match="cannot be lifted"):
        hold.lift("web.service", user=True)
