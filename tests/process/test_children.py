# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance has started ends with it when it is replaced; clients notice none of its workers."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import Client
from tests.support import eventually, runs
from upgrader.testing import Service

PROGRAM = Path(__file__).parents[1] / "system" / "services" / "pooled.py"
METHODS = pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])


COMMAND = [sys.executable, str(PROGRAM)]


@contextlib.contextmanager
def started(face: str, method: str, path: Path) -> Iterator[tuple[Service, Client]]:
    environment = {"FACE": face, "METHOD": method, "BIND": f"unix:{path}"}
    with Service(environment=environment) as service:
        service.start(COMMAND)
        with Client(path) as client:
            yield service, client
        assert service.process
        left = list(below(service.process.pid))
        service.kill()
        for pid in left:  # as PID 1 does at a stop
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def below(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from below(child)


@METHODS
def test_p10_workers_end_with_the_instance(face: str, method: str, tmp_path: Path) -> None:
    """Those of a pool and all that it needs; so it is after each of some upgrades."""
    with started(face, method, tmp_path / "socket") as (service, client):
        for _ in range(2):
            before = [*map(int, client.ask("pids").split())]
            service.live(COMMAND)
            assert eventually(lambda: not service.draining)

            assert not any(map(runs, before))
        assert client.ask("pids")


def test_p10_what_has_no_sigterm_is_killed(face: str, tmp_path: Path) -> None:
    """And what a child has started ends, too; what is kept stays, and the new instance learns of it."""
    with started(face, "fork", tmp_path / "socket") as (service, client):
        before = [int(client.ask(f"start {word}")) for word in ("plain", "stubborn", "alone")]
        kept = int(client.ask("start kept"))
        try:
            assert eventually(lambda: [*below(before[-1])] != [])
            before += below(before[-1])
            for _ in range(2):
                service.live(COMMAND)
                assert "worker" == client.ask("passed")
                assert eventually(lambda: not service.draining)

                assert not any(map(runs, before))
                assert runs(kept)
        finally:
            os.kill(kept, signal.SIGKILL)


def test_p10_a_worker_holds_no_connection(face: str, tmp_path: Path) -> None:
    """One that was forked while a client was connected is not in the way when that connection ends."""
    path = tmp_path / "socket"
    with started(face, "fork", path) as (service, first), Client(path) as second:
        assert "1" == second.ask("generation")
        workers = [*map(int, first.ask("pids").split())]

        assert "" == first.ask("quit")
        assert all(map(runs, workers))
        service.live(COMMAND)
        workers = [*map(int, second.ask("pids").split())]
        assert "" == second.ask("quit")
        assert all(map(runs, workers))
