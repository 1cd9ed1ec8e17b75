# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program whose state an adapter saves and loads: each number is given once, whatever happens."""

import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually, runs, started
from upgrader.codes import Code
from upgrader.testing import Service, ServiceError
from upgrader.testing.pid1_bus import Typed

PROGRAM = str(Path(__file__).with_name("counting.py"))


class CountingService(Service):
    """A unit with KillMode=process, and what its clients have got: numbers, and from which process."""

    def __init__(self, directory: Path) -> None:
        super().__init__(environment={"UPGRADER_DOWNTIME_LIMIT": "2s"})
        self.path = directory / "listener"
        self.version = 0
        self.numbers: list[int] = []

    def _properties(self) -> Mapping[str, Typed]:
        return {**super()._properties(), "KillMode": ("s", "process")}

    def command(self) -> list[str]:
        self.version += 1
        options = [
            "--adapter",
            "tests.process.counting_adapter",
            "--listen",
            f"main=unix:{self.path}",
        ]
        program = [sys.executable, PROGRAM, str(self.version)]
        return [sys.executable, "-m", "upgrader.run", *options, "--", *program]

    def ask(self) -> int:
        """Be a client; returns the process that has answered."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SETTLE)
            sock.connect(str(self.path))
            number, pid = sock.makefile().readline().split()
        self.numbers.append(int(number))
        return int(pid)

    @property
    def saved(self) -> bool:
        """Whether the state of a program is whole: its file is sealed then."""
        files = [fd.fileno() for name, fd in self.store if name.endswith(".state")]
        return any(fcntl.fcntl(each, fcntl.F_GET_SEALS) & fcntl.F_SEAL_GROW for each in files)

    def log(self) -> list[list[str]]:
        """What the programs have written to the file that they share."""
        (fd,) = [fd for name, fd in self.store if name.endswith("shared.log")]
        return [line.split() for line in os.pread(fd.fileno(), 1 << 20, 0).decode().splitlines()]

    def all_once(self) -> bool:
        """Whether the numbers are without a gap and without one that came twice."""
        return self.numbers == [*range(1, len(self.numbers) + 1)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[CountingService]:
    with CountingService(tmp_path) as service:
        yield service
        if service.process:
            service.stop(for_good=True)
        assert not programs()
        assert service.all_once(), service.numbers


def asked_all_the_time(service: CountingService, do: Callable[[], object]) -> None:
    """Do something while a client asks without a pause."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            service.ask()

    client = threading.Thread(target=ask)
    client.start()
    try:
        do()
    finally:
        over.set()
        client.join(SETTLE)


def programs() -> list[int]:
    """All programs that run."""
    return started(PROGRAM)


@pytest.mark.parametrize("how", ["live", "restart"])
def test_the_state_goes_on(service: CountingService, how: str) -> None:
    """With the next program, while clients ask; the shared file is the same, and the old one ends."""
    service.start(service.command())
    first = service.ask()
    for _ in range(2):
        if how == "live":
            asked_all_the_time(service, lambda: service.live(service.command()))
        else:
            asked_all_the_time(service, lambda: service.restart(service.command()))
        assert first != service.ask()
        assert eventually(lambda pid=first: not runs(pid))  # type: ignore[misc]
        first = service.ask()
    assert [str(n) for n in service.numbers] == [number for number, _ in service.log()]
    assert 3 == len({pid for _, pid in service.log()})
    assert eventually(lambda: not [n for n, _ in service.store if n.endswith(".state")])


def test_a_crash_of_the_runner(service: CountingService) -> None:
    """The next runner has the state saved by the program that has lived on."""
    service.start(service.command())
    first = service.ask()
    service.kill()
    asked_all_the_time(service, lambda: service.start(service.command()))
    assert first != service.ask()
    assert eventually(lambda: not runs(first))


def test_it_serves_through_a_restart(service: CountingService) -> None:
    """Nothing keeps a program from outliving its runner: it goes on until the next one is ready."""
    service.start(service.command())
    first = service.ask()
    service.stop()
    assert first == service.ask()
    service.start(service.command())
    assert first != service.ask()


@pytest.mark.parametrize(
    ("flaw", "how", "why"),
    [
        ("load", "live", "has not loaded"),
        ("die", "restart", "has ended with status 3"),
        pytest.param("hang", "crash", "within downtime-limit", marks=pytest.mark.matrix),
        pytest.param("hang", "live", "no progress", marks=pytest.mark.matrix),
        pytest.param("die", "live", "has ended with status 3", marks=pytest.mark.matrix),
        pytest.param("load", "restart", "has not loaded", marks=pytest.mark.matrix),
        pytest.param("hang", "restart", "within downtime-limit", marks=pytest.mark.matrix),
        pytest.param("load", "crash", "has not loaded", marks=pytest.mark.matrix),
        pytest.param("die", "crash", "has ended with status 3", marks=pytest.mark.matrix),
    ],
)
def test_a_program_that_cannot_load(
    service: CountingService, flaw: str, how: str, why: str
) -> None:
    """Nothing of it is left, and the old one goes on with what it had; a later upgrade works."""
    service.start(service.command())
    first = service.ask()
    service.environment["FLAW"] = flaw
    if how == "live":
        with pytest.raises(ServiceError, match=why):
            service.live(service.command())
    else:
        service.stop() if how == "restart" else service.kill()
        with pytest.raises(ServiceError, match=why):
            service.start(service.command())
    assert [first] == programs()
    assert first == service.ask()
    del service.environment["FLAW"]
    if how == "live":
        service.live(service.command())
    else:
        service.start(service.command())
    assert first != service.ask()
    assert eventually(lambda: not runs(first))


def test_the_old_program_dies_when_it_has_saved(service: CountingService) -> None:
    """Between Go and Ack: the new one goes on from what was saved."""
    service.environment["UPGRADER_DOWNTIME_LIMIT"] = "10s"
    service.start(service.command())
    first = service.ask()
    service.environment["FLAW"] = "slow"
    upgrade = service.begin_live(service.command())
    assert eventually(lambda: service.saved)
    os.kill(first, signal.SIGKILL)
    upgrade.wait()
    assert first != service.ask()


def test_a_program_that_does_not_save(service: CountingService) -> None:
    """An upgrade is refused, and it serves on: it had stopped for that."""
    service.environment |= {"FLAW": "save", "UPGRADER_DOWNTIME_LIMIT": "300ms"}
    service.environment["UPGRADER_MIGRATION_TIMEOUT"] = "2s"
    service.start(service.command())
    first = service.ask()
    del service.environment["FLAW"]
    with pytest.raises(ServiceError) as refused:
        service.live(service.command())
    assert Code.BUSY_WORK is refused.value.code, refused.value
    assert first == service.ask()


@pytest.mark.matrix
def test_a_preflight_of_a_state(service: CountingService) -> None:
    """The new program loads it, and ends; the old one goes on."""
    service.start(service.command())
    first = service.ask()
    service.environment["UPGRADER_PREFLIGHT"] = "1"
    with pytest.raises(ServiceError, match="preflight passed"):
        service.live(service.command())
    assert [first] == programs()
    assert first == service.ask()
