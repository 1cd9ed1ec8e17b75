# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin's policy files: which rule counts, and what becomes of a mistake in one."""

import re
from pathlib import Path

import pytest

from upgrader.hooks import policy
from upgrader.hooks.policy import Policy


def test_where_nothing_is_said(tmp_path: Path) -> None:
    """Without a rule a hook may do what is best, whether the directories exist or not."""
    rules = policy.read((tmp_path, tmp_path / "missing"))

    assert policy.Rule("*", Policy.AUTO) == policy.decide("web.service", rules)


@pytest.mark.parametrize("page", ["admins", "packagers"])
def test_the_example_of_the_documentation(tmp_path: Path, page: str) -> None:
    """Is one that is understood."""
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    (example,) = re.findall(r"^```policy\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "local.conf").write_text(example)
    rules = policy.read((tmp_path,))

    assert rules
    assert [] == [rule for rule in rules if rule.complaint]


def test_the_last_match_counts(tmp_path: Path) -> None:
    """Files by name, lines by place; comments and empty lines are none."""
    (tmp_path / "20-late.conf").write_text("web.service = live\n")
    (tmp_path / "10-early.conf").write_text("# all\n\n*.service=never\nweb@*.service =restart\n")
    (tmp_path / "ignored").write_text("* = never\n")
    rules = policy.read((tmp_path,))

    assert Policy.LIVE is policy.decide("web.service", rules).policy
    assert Policy.RESTART is policy.decide("web@1.service", rules).policy
    assert Policy.NEVER is policy.decide("other.service", rules).policy


def test_an_admin_replaces_the_file_of_a_package(tmp_path: Path) -> None:
    """The same name in the later directory, empty or not."""
    vendor, admin = tmp_path / "usr", tmp_path / "etc"
    for place in (vendor, admin):
        place.mkdir()
    (vendor / "web.conf").write_text("web.service = never\n")
    (admin / "web.conf").write_text("")

    assert Policy.AUTO is policy.decide("web.service", policy.read((vendor, admin))).policy


@pytest.mark.parametrize(
    ("line", "unit", "said"),
    [
        ("web.service = nevr", "web.service", "'nevr' is none of auto, live, restart, never"),
        ("web.service never", "web.service", "not PATTERN = WORD"),
        ("= nevr", "any.service", "'nevr' is none"),
    ],
)
def test_a_mistake_leaves_alone_what_it_may_be_about(
    tmp_path: Path, line: str, unit: str, said: str
) -> None:
    """Who wrote a line wanted something special for the unit; the complaint names file and line."""
    file = tmp_path / "local.conf"
    file.write_text(f"#\n{line}\n")
    rule = policy.decide(unit, policy.read((tmp_path,)))

    assert Policy.NEVER is rule.policy
    assert rule.complaint.startswith(f"{file}:2: ")
    assert said in rule.complaint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """What it says is not known, so no unit is touched."""
    (tmp_path / "binary.conf").write_bytes(b"\xff\xfe")
    rule = policy.decide("web.service", policy.read((tmp_path,)))

    assert Policy.NEVER is rule.policy
    assert "cannot be read" in rule.complaint
