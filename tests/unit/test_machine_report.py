# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the demonstration with a virtual machine shows."""

import json

import pytest

from upgrader.lab.demo.machine import MachineReport, MachineUpgrade

ROW = MachineUpgrade(1, reported=30.2, ping_gap=54.0, guest_gap=247.4, pings=435, lost=1)


def test_a_report() -> None:
    """The pauses stand side by side."""
    report = MachineReport("QEMU 7.2", [ROW], counter=True, memory=True)

    (row,) = [line for line in report.table().splitlines() if line.startswith("       1")]
    assert ["1", "30", "ms", "54", "ms", "247", "ms", "1", "of", "435"] == row.split()
    assert not report.lost
    assert 30.2 == json.loads(report.json())["upgrades"][0]["reported"]


@pytest.mark.parametrize("what", [{"counter": False}, {"memory": False}, {"failed": "upgrade 1"}])
def test_a_loss(what: dict[str, object]) -> None:
    """It is seen in the table and in the exit code."""
    values = {"counter": True, "memory": True, **what}
    report = MachineReport("QEMU 7.2", [ROW], **values)  # type: ignore[arg-type]

    assert report.lost
    assert any(word in report.table() for word in ("WITH A GAP", "WRONG", "FAILED: upgrade 1"))
