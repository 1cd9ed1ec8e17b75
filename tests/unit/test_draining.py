# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draining programs that an earlier runner has left."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from upgrader.runner.adapter import ProgramAdapter
from upgrader.runner.draining import Draining, ToldToDrain
from upgrader.runner.host import PROGRAM
from upgrader.runner.processes import RunningProcess

#: Needs a moment for what it is at, and minds a second signal.
BUSY = """
import signal, sys, time
def ends(*_):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    time.sleep(0.2)
    sys.exit(0)
signal.signal(signal.SIGTERM, ends)
print(flush=True)
signal.pause()
"""


@pytest.fixture
def programs() -> Iterator[list["subprocess.Popen[bytes]"]]:
    command = [sys.executable, "-c", BUSY]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    for each in started:
        assert each.stdout
        assert each.stdout.readline()
    yield started
    for each in started:
        each.kill()
        each.communicate()


def test_what_hears_late_that_it_was_replaced(programs: list["subprocess.Popen[bytes]"]) -> None:
    """Three at once, as after a runner that was killed before it could tell them: each ends after what it
    is at, the oldest as well."""
    kept = {f"{PROGRAM}{each.pid}": RunningProcess.of(each.pid) for each in programs}
    forgotten: list[int] = []
    host = cast(
        "Any",
        SimpleNamespace(
            programs=lambda: kept,
            options=SimpleNamespace(drain=signal.SIGTERM, drain_limit=60.0),
            instance=SimpleNamespace(forget=lambda name: None),
            notifications=SimpleNamespace(forget=forgotten.append),
        ),
    )
    paths, told = (
        cast("Any", SimpleNamespace(restore=lambda: None)),
        SimpleNamespace(value=ToldToDrain()),
    )

    async def drain() -> None:
        draining = Draining(host, ProgramAdapter(host), paths, cast("Any", told))
        draining.begin([*kept.values()][-1])
        await asyncio.gather(*draining._drains)

    asyncio.run(drain())

    assert [0, 0, 0, None] == [each.poll() for each in programs]
    assert sorted(each.pid for each in programs[:3]) == sorted(forgotten)
    for process in kept.values():
        process.pidfd.close()
