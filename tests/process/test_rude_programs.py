# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs behind a runner that are rude to what they share, to whoever starts them, or to their checks."""

import signal
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.process.runner_service import UNAWARE, RunnerService, another, who
from tests.support import SETTLE, eventually, runs, started
from upgrader.testing import ServiceError


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunnerService]:
    with RunnerService(tmp_path) as service:
        yield service
        if service.process:
            service.stop(for_good=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a program answers there."""
    try:
        with socket.create_connection(("127.0.0.1", port), SETTLE) as client:
            client.sendall(b"who\n")
            return bool(client.recv(100))
    except OSError:
        return False


def test_a_listener_that_an_old_program_shuts_down(service: RunnerService) -> None:
    """It listens again at once, in a live upgrade and in a restart."""
    port = free_port()
    first_of_all = ("--listen", f"first=127.0.0.1:{port}")
    service.environment["FLAW"] = "shuts"

    def command() -> list[str]:
        at, words = 3, service.command()
        return [*words[:at], *first_of_all, *words[at:]]

    service.start(command())
    first = who(service)
    assert answers(port)
    service.live(command())
    another(service, first)
    assert eventually(lambda: not runs(first))
    assert eventually(lambda: answers(port))
    second = who(service)
    service.restart(command())
    assert eventually(lambda: not runs(second))
    assert eventually(lambda: answers(port))
    assert "listens again; who waited there was refused" in service.stderr


def test_a_program_that_fails_if_it_cannot_tell_its_end(service: RunnerService) -> None:
    """Its runner is gone by then, through a restart or a crash; the next one is there for it, at the same file."""
    for place in (service.runtime_directory, service.runtime_directory.parent):
        place.chmod(0o755)
    service.environment["FLAW"] = "tells"
    service.start(service.command())
    for ends in (service.stop, service.kill):
        old = who(service)
        with service.connect() as stream:
            assert "begun" == stream.ask("begin")
            ends()
            service.start(service.command())
            another(service, old)
            assert "ended" == stream.ask("end")
        assert eventually(lambda old=old: not runs(old))  # type: ignore[misc]
    assert eventually(lambda: 1 == len([*service.runtime_directory.glob("upgrader-run-*")]))


def test_a_path_whose_listener_an_old_program_shuts_down(service: RunnerService) -> None:
    """Nobody can have it listen again, so its unit fails, and the next start binds another one there."""
    service.environment["FLAW"] = "shuts"
    service.start(service.command())
    service.live(service.command())
    runner = service.process
    assert runner
    assert 1 == runner.wait(SETTLE)
    assert "must be bound anew" in service.stderr
    service.process = None

    service.environment.clear()
    service.start(service.command())
    third = who(service)
    service.live(service.command())
    another(service, third)


def test_a_check_that_leaves_something_in_the_background(
    service: RunnerService, tmp_path: Path
) -> None:
    """It is ended with its check, whether that is good or not."""
    pids = tmp_path / "pids"
    check = f"sh -c 'sleep 600 & echo $! >>{pids}; true'"
    service.start(service.command("--check", check))
    service.live(service.command("--check", check))
    left = list(map(int, pids.read_text().split()))
    pids.unlink()

    assert len(left) == 3  # a live upgrade tries the program first
    assert [] == [pid for pid in left if runs(pid)]


class Listening(RunnerService):
    """One that notes for how much time it was asked."""

    asked = ""

    def _hear(self, fields: Mapping[str, str]) -> None:
        self.asked = fields.get("EXTEND_TIMEOUT_USEC", self.asked)
        super()._hear(fields)


def test_a_program_that_asks_for_more_time_to_start(tmp_path: Path) -> None:
    """PID 1 hears that before the program is ready."""
    with Listening(tmp_path) as service:
        service.environment["FLAW"] = "long"
        service.start(service.command())
        assert "30000000" == service.asked
        service.stop(for_good=True)


def test_a_program_that_is_never_ready(service: RunnerService) -> None:
    """Whoever ends that is told what was waited for."""
    service.environment["FLAW"] = "hang"
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(service.start, service.command())
        assert eventually(lambda: bool(started(UNAWARE)))
        assert service.process
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(ServiceError, match="it has not sent READY=1"):
            starting.result()
