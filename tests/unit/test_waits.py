# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the demonstration says of long waits."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import eventually
from upgrader.lab.demo.ledger import Ledger, RequestKind, Span
from upgrader.lab.demo.waits import LONG, Delays, Switchover, Wait, WaitCause, attribute

SWITCHOVER = Switchover(held=10.0, owned=10.008, answered=10.02)


@pytest.mark.parametrize(
    ("wait", "without_cpu", "cause"),
    [
        (Wait(9.999, 10.0095), 0.0, WaitCause.PAUSE),
        (Wait(10.007, 10.02), 0.003, WaitCause.OPENING),
        (Wait(9.5, 9.52), 0.015, WaitCause.CPU),
        (
            Wait(10.0, 10.012),
            0.011,
            WaitCause.CPU,
        ),  # in the pause, but that waited for a CPU itself
        (Wait(9.9, 9.95), 0.01, WaitCause.OTHER),
        (Wait(9.98, 10.03), 0.001, WaitCause.OTHER),
    ],
)
def test_the_largest_part_is_named(wait: Wait, without_cpu: float, cause: WaitCause) -> None:
    """But only if it is half of the wait at least."""
    assert cause is attribute(wait, SWITCHOVER, without_cpu)


def test_without_an_upgrade_there_is_only_the_cpu() -> None:
    """The same wait, in a window with no upgrade in it."""
    assert WaitCause.OTHER is attribute(Wait(9.999, 10.0095), None, 0.001)
    assert WaitCause.CPU is attribute(Wait(9.999, 10.0095), None, 0.009)


def test_only_long_waits_of_the_window_are_kept() -> None:
    """Whatever became of the request."""
    ledger = Ledger(span=Span(100.0, 1))
    ledger.fail(RequestKind.NEW, 100.0, 100.0 + LONG * 2, "closed")
    ledger.fail(RequestKind.NEW, 100.0, 100.0 + LONG / 2, "closed")
    ledger.fail(RequestKind.NEW, 90.0, 99.0, "closed")  # over before the window began
    ledger.fail(RequestKind.HELD, 100.0, 101.0, "closed")

    assert ledger.span
    assert [Wait(100.0, 100.0 + LONG * 2)] == ledger.span.waits


def test_a_process_without_a_cpu(tmp_path: Path) -> None:
    """Two that compute on one CPU have each waited for about half of the time."""
    cpu = str(min(os.sched_getaffinity(0)))
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(["taskset", "-c", cpu, *burn]) for _ in range(2)]
    members = tmp_path / "cgroup.procs"
    try:
        members.write_text("".join(f"{each.pid}\n" for each in burners) + "999999999\n")
        since = time.monotonic()
        with Delays(members) as delays:
            assert eventually(lambda: delays.during(Wait(since, time.monotonic())) > 0.1)
        assert delays.during(Wait(since - 1000, since - 999)) == 0.0  # nobody has looked then
    finally:
        for process in burners:
            process.kill()
            process.wait()
