# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hold that a failed upgrade leaves."""

from pathlib import Path

import pytest

from upgrader.tool import hold
from upgrader.tool.hold import Hold, HoldError, HoldKind


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "upgrader" / "hold"


def test_a_hold_is_kept_until_it_is_lifted() -> None:
    """What was placed is read again, by unit and in the list, and lifted once."""
    placed = Hold.now("web.service", "version 3 refused: not with me")

    hold.place(placed, user=True)

    assert placed == hold.read("web.service", user=True)
    assert ["web.service"] == hold.on_file(user=True)
    assert hold.read("other.service", user=True) is None
    hold.lift("web.service", user=True)
    hold.lift("web.service", user=True)
    assert [] == hold.on_file(user=True)


def test_a_newer_hold_replaces_an_older_one(state: Path) -> None:
    """One file a unit, and nothing half-written beside it."""
    for cause in ("first", "second"):
        hold.place(Hold.now("web.service", cause), user=True)

    assert ["web.service"] == [path.name for path in state.iterdir()]
    found = hold.read("web.service", user=True)
    assert found is not None
    assert "second" == found.cause


@pytest.mark.parametrize(
    "data",
    [b"{", b'{"unit": "\xff"}', b"[" * 100_000, b'{"unit": "x", "since": 1e300, "cause": "x"}'],
    ids=lambda data: repr(data[:10]),
)
def test_a_damaged_hold_still_holds(state: Path, data: bytes) -> None:
    """Somebody put it there, so nothing is restarted because it cannot be read."""
    state.mkdir(parents=True)
    (state / "web.service").write_bytes(data)

    found = hold.read("web.service", user=True)

    assert found is not None
    assert "cannot be read" in found.cause
    assert not found.is_over(began=1e10, fingerprint="other")


def test_a_hold_that_cannot_be_written_says_so(state: Path) -> None:
    """The error names the unit, and what is in the way."""
    state.parent.mkdir(parents=True)
    state.write_text("in the way")

    with pytest.raises(HoldError, match=r"web\.service.*something else is in the way"):
        hold.place(Hold.now("web.service", "cause"), user=True)
    with pytest.raises(HoldError, match="cannot be released"):
        hold.lift("web.service", user=True)


@pytest.mark.parametrize(
    ("failed", "began", "on_disk", "over"),
    [
        ("f", 0.0, "f", False),  # nobody serves
        ("f", 99.0, "f", False),  # the old instance does
        ("f", 99.0, "g", True),  # but another version is on disk
        ("f", 101.0, "f", True),  # a newer instance serves, so it was good after all
        ("f", 99.0, "", False),  # nobody knows what is on disk
        ("", 99.0, "g", False),  # nobody knew what failed
        ("", 101.0, "", True),
    ],
)
def test_n4_a_hold_of_a_failure_is_over_when_it_is_not_true(
    failed: str, began: float, on_disk: str, over: bool
) -> None:
    """By what is on disk, and by who serves since; whoever did it."""
    assert over == Hold("web.service", 100.0, "why", failed).is_over(began, on_disk)


def test_an_admins_hold_is_not_over_by_itself() -> None:
    """Neither a failure nor a success takes its place; it is released."""
    hold.place(Hold.now("web.service", "freeze", kind=HoldKind.ADMIN), user=True)
    hold.place(Hold.now("web.service", "it was bad"), user=True)
    hold.lift("web.service", user=True)

    found = hold.by_admin("web.service", user=True)
    assert found is not None
    assert "freeze" == found.cause
    assert not found.is_over(began=1e10, fingerprint="other")
    hold.release("web.service", None, user=True)
    assert hold.read("web.service", user=True) is None


def test_the_hold_of_an_older_version_of_this_tool_is_read() -> None:
    """Its file has three fields."""
    path = hold.directory(user=True) / "web.service"
    path.parent.mkdir(parents=True)
    path.write_text('{"unit":"web.service","since":100.0,"cause":"it was bad"}')

    assert Hold("web.service", 100.0, "it was bad") == hold.read("web.service", user=True)
