# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a private systemd costs: boot, one command, close; measured, not tested."""

import statistics
import time

import pytest

from tests.support import cannot_run
from upgrader.lab.private_systemd import PrivateSystemd, TreeError

RUNS = 10


@pytest.mark.system
@pytest.mark.parametrize("tree", ["host", "trixie"])
def test_boot(tree: str) -> None:
    """A tree that is not cached is fetched first; the median leaves that out."""
    boots, commands, ends = [], [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        try:
            machine = PrivateSystemd.boot(tree)
        except TreeError as error:
            cannot_run(str(error))
        with machine:
            up = time.perf_counter()
            machine.run(["true"])
            done = time.perf_counter()
        boots.append(up - start)
        commands.append(done - up)
        ends.append(time.perf_counter() - done)
    boot, command, end = (statistics.median(times) * 1000 for times in (boots, commands, ends))
    print(f"\n{tree}: boot {boot:.0f} ms, command {command:.0f} ms, close {end:.0f} ms")
