# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as bad of a fault that was played, and how it is told."""

import json
from typing import Any

import pytest

from upgrader.lab.demo.fault_report import FaultRow, table, to_json


def row(**changes: Any) -> FaultRow:
    """A fault that did no harm, with these values instead."""
    values: dict[str, Any] = {
        "fault": "version hangs", "failed_requests": 0, "broken_streams": 0, "connections_lost": 0,
        "state_errors": 0, "stall_ms": 12.0, "caller_told": "not ready in time", "exit_code": 1,
        "then": "generation 1, cold start", "must_lose": "", "next_upgrade": "upgraded",
        "next_upgrade_done": True, "losses": [],
    }  # fmt: skip
    return FaultRow(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"failed_requests": 1},
        {"broken_streams": 1},
        {"connections_lost": 1},
        {"state_errors": 1},
        {"caller_told": ""},
        {"next_upgrade_done": False},
        {"next_upgrade_done": False, "must_lose": "it is killed"},
    ],
    ids=str,
)
def test_what_no_fault_may_do(changes: dict[str, Any]) -> None:
    """It is marked, and the last line says so."""
    bad = row(**changes)

    assert bad.bad
    assert "! version hangs" in table([row(), bad])
    assert table([row(), bad]).endswith("1 of 2 did what they must not (marked with !).")


def test_what_must_be_lost_is_said() -> None:
    """A loss that cannot be avoided is none of the upgrade's, and is told with its reason."""
    killed = row(failed_requests=3, must_lose="the kernel closes it")

    assert not killed.bad
    assert "necessarily: the kernel closes it" in table([killed])
    assert "nothing was lost that could have been kept" in table([killed])
    assert "the kernel" not in table([row(must_lose="the kernel closes it")])


def test_the_json_is_a_list() -> None:
    """One object for each fault, with the fields of the value."""
    assert [{**json.loads(to_json([row()]))[0]}] == json.loads(to_json([row()]))
    assert "version hangs" == json.loads(to_json([row()]))[0]["fault"]
