# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that a service has forked: what is meant for one of them does not reach the instance, and none
outlives a service under test."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.process.chat import Client
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("workers.py")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_signal_for_a_worker(face: str, method: str, tmp_path: Path) -> None:
    """SIGTERM ends the worker, as in any other program; the instance serves on."""
    path = tmp_path / "socket"
    with Service() as service:
        service.start([sys.executable, str(PROGRAM), face, method, str(path)])
        with Client(path) as client:
            os.kill(int(client.ask("worker")), signal.SIGTERM)

            assert str(-signal.SIGTERM) == client.ask("again")
            assert int(client.ask("worker"))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_close_ends_the_workers(method: str, tmp_path: Path) -> None:
    """As PID 1 ends what is in the cgroup of a unit, also if the program was killed."""
    path = tmp_path / "socket"
    with Service() as service:
        service.start([sys.executable, str(PROGRAM), "blocking", method, str(path)])
        with Client(path) as client:
            worker = int(client.ask("worker"))
        os.kill(worker, 0)

    assert not Path(f"/proc/{worker}").exists()
