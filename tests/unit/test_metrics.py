# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics: which series there are of a unit that serves, has failed, or had a preflight."""

from dataclasses import replace

import pytest

from tests.unit import screens
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Description, Migration
from upgrader.tool.instance_client import last_upgrade
from upgrader.tool.overview import GONE, Overview
from upgrader.tool.prometheus import HELP, metrics


def samples(overview: Overview) -> dict[str, str]:
    """The values by name and labels but the unit's."""
    found = {}
    for line in metrics([overview]).splitlines():
        if not line.startswith("#"):
            name, value = line.replace(f'unit="{overview.unit}"', "").rsplit(" ", 1)
            found[name] = value
    return found


def test_n6_series_of_a_failed_unit_do_not_vanish() -> None:
    """It does not serve, its last upgrade has failed: the tool itself knows that."""
    found = samples(screens.DOWN)

    assert "0" == found["upgrader_serving{}"]
    assert "1" == found['upgrader_held{,kind="failed"}']
    assert "0" == found['upgrader_last_upgrade_success{,mode="restart"}']
    assert {"upgrader_upgrades_total", "upgrader_stored_fds"} <= {
        name.partition("{")[0] for name in found
    }


def test_n6_a_preflight_that_passes_is_no_failed_upgrade() -> None:
    """It has series of its own, and the last upgrade keeps its own."""
    found = samples(screens.DRAINING)

    assert "1" == found['upgrader_last_upgrade_success{,mode="live"}']
    assert "0.0043" == found['upgrader_last_upgrade_pause_seconds{,mode="live"}']
    assert "1" == found["upgrader_last_preflight_success{}"]
    assert "upgrader_last_preflight_success{}" not in samples(screens.WELL)


def test_n6_a_unit_of_which_only_its_hold_is_left_is_not_down() -> None:
    """It shows in the list, so that somebody can lift the hold."""
    found = samples(replace(screens.FROZEN, active=GONE, serves=False, instance=None))

    assert "1" == found['upgrader_held{,kind="admin"}']
    assert "upgrader_serving{}" not in found


def test_every_metric_is_explained() -> None:
    """All that there are have their words, and are told once for all units."""
    text = metrics([screens.WELL, screens.DOWN, screens.DRAINING, screens.FOREIGN])

    names = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert sorted(set(names)) == sorted(names)
    assert set(names) == set(HELP)


@pytest.mark.parametrize(
    ("phase", "known"),
    [(Phase.DONE, True), (Phase.FAILED, True), (Phase.PREFLIGHT, False), (Phase.CANCELLED, False)],
)
def test_what_an_older_library_says_of_its_last_upgrade(phase: Phase, known: bool) -> None:
    """It has one field for upgrades and preflights."""
    last = Migration(phase, "live", 1, 2)

    assert (last if known else Migration()) == last_upgrade(Description("web", migration=last))
    both = Description("web", migration=Migration(Phase.FAILED, "live"), last_upgrade=last)
    assert last == last_upgrade(both)
