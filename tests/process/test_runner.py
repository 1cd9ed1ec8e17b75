# SPDX-License-Identifier: LGPL-2.1-or-later
"""A runner and a program that knows nothing of it: starts, restarts, crashes, stops, refusals."""

import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.runner_service import UNAWARE, Client, RunnerService, another, who
from tests.support import SETTLE, eventually, runs, started
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.runner.processes import parent
from upgrader.testing import Service, ServiceError


def refuses(service: RunnerService) -> bool:
    """Whether nobody listens any more."""
    try:
        who(service)
    except OSError:
        return True
    return False


def kept(service: Service) -> list[str]:
    return sorted(name for name, _ in service.store)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunnerService]:
    with RunnerService(tmp_path) as service:
        yield service
        if service.process:
            service.stop(for_good=True)


def test_a_restart_loses_nobody(service: RunnerService) -> None:
    """The old program serves on until the new one is ready, then ends after what it is at; its path
    and what PID 1 keeps are as before."""
    service.start(service.command())
    first = who(service)
    with service.connect() as stream:
        assert "begun" == stream.ask("begin")
        service.stop()
        assert first == who(service)
        assert Origin.RESTART is service.start(service.command()).origin
        second = another(service, first)
        assert runs(first)
        assert "ended" == stream.ask("end")
        assert "" == stream.line()
    assert eventually(lambda: not runs(first))
    assert eventually(lambda: kept(service) == kept_of(second))
    assert second == who(service)


def kept_of(pid: int) -> list[str]:
    return [f"upgrader-entry-kept.program.{pid}", "upgrader-listener-main"]


def test_a_runner_that_is_killed(service: RunnerService) -> None:
    """Its program serves on, and the next runner drains it."""
    service.start(service.command())
    first = who(service)
    service.kill()
    assert first == who(service)

    service.start(service.command())

    second = another(service, first)
    assert eventually(lambda: not runs(first))
    assert eventually(lambda: kept(service) == kept_of(second))


def test_a_stop(service: RunnerService) -> None:
    """The program ends after what it is at; nothing is left, not even the path."""
    service.start(service.command())
    first = who(service)
    with service.connect() as stream:
        assert "begun" == stream.ask("begin")
        ending = threading.Thread(target=service.stop, kwargs={"for_good": True})
        ending.start()
        assert eventually(lambda: refuses(service))
        assert runs(first)
        assert "ended" == stream.ask("end")
        ending.join(SETTLE)
    assert not runs(first)
    assert [] == [name for name in kept(service) if "listener" in name]
    assert [] == list(service.path.parent.iterdir())


def test_a_program_that_ends(service: RunnerService) -> None:
    """The runner ends with a failure and leaves the listeners: no client is refused meanwhile."""
    service.start(service.command())
    first = who(service)
    os.kill(first, signal.SIGKILL)
    assert service.process
    assert 1 == service.process.wait(SETTLE)
    service.kill()
    with service.connect() as waiting:
        service.start(service.command())
        assert first != int(waiting.ask("who"))


@pytest.mark.parametrize(
    ("flaw", "options", "reason"),
    [
        ("exit", (), "has ended with status 3, before it was ready"),
        pytest.param("blocking", (), "has changed O_NONBLOCK", marks=pytest.mark.matrix),
        pytest.param("", ("--check", "false"), "false has ended", marks=pytest.mark.matrix),
    ],
)
def test_a_bad_program(
    service: RunnerService, flaw: str, options: tuple[str, ...], reason: str
) -> None:
    """It is ended before its runner says why, and the old one serves on."""
    service.start(service.command())
    first = who(service)
    service.stop()
    service.environment["FLAW"] = flaw
    with pytest.raises(ServiceError, match=reason):
        service.start(service.command(*options))
    assert first == who(service)
    assert runs(first)
    service.environment.clear()
    service.start(service.command())
    another(service, first)
    assert eventually(lambda: not runs(first))


def test_what_the_program_is_given(service: RunnerService) -> None:
    """What PID 1 would give to it, and nothing of the runner's."""
    service.environment["WATCHDOG_USEC"] = "30000000"
    service.environment["WATCHDOG_PID"] = "1"
    service.start(service.command())
    pid = who(service)
    with service.connect() as client:
        facts: dict[str, Any] = json.loads(client.ask("facts"))
    environment = facts["environment"]
    assert str(pid) == environment["WATCHDOG_PID"] == environment["LISTEN_PID"]
    assert "main" == environment["LISTEN_FDNAMES"]
    assert [] == [name for name in environment if name.startswith("UPGRADER")]
    assert facts["session"]
    assert [*resource.getrlimit(resource.RLIMIT_NOFILE)] == facts["files"]
    (path,) = facts["fds"]
    assert path.startswith("socket:")


def test_signals_are_as_systemd_leaves_them(service: RunnerService, tmp_path: Path) -> None:
    """SIGPIPE is ignored, and SIGXFSZ, which Python ignores as well, is not; none is blocked."""
    found = tmp_path / "signals"
    service.start(service.command("--check", f"sh -c 'grep Sig /proc/self/status > {found}'"))
    signals = dict(line.split(":\t") for line in found.read_text().splitlines())
    found.unlink()

    # Signals 32 and 33 are glibc's own; make ignores one in what it starts, such as these tests.
    of_glibc = 0b11 << 32 - 1
    assert 1 << signal.SIGPIPE - 1 == int(signals["SigIgn"], 16) & ~of_glibc
    assert 0 == int(signals["SigBlk"], 16)


def test_a_reload_and_what_the_program_says(service: RunnerService) -> None:
    """A signal to the runner is the program's; its status is the unit's."""
    service.start(service.command("--reload", "SIGHUP"))
    assert service.process
    pid = who(service)
    service.process.send_signal(signal.SIGHUP)

    assert eventually(lambda: service.status_text == f"reloaded by {pid}")


def test_a_live_upgrade(service: RunnerService) -> None:
    """The source's program serves until the new one does, and ends after what it is at; then its
    runner ends, and PID 1 keeps the new program only."""
    service.start(service.command())
    first, runner = who(service), service.process
    with service.connect() as stream:
        assert "begun" == stream.ask("begin")
        status = service.live(service.command())
        assert (2, Origin.LIVE) == (status.generation, status.origin)
        assert status.pause
        assert status.pause < 1
        second = another(service, first)
        assert runs(first)
        os.kill(first, signal.SIGHUP)
        assert "ended" == stream.ask("end")
    assert eventually(lambda: not runs(first))
    assert runner
    assert 0 == runner.wait(SETTLE)
    assert f"reloaded by {first}" != service.status_text
    os.kill(second, signal.SIGHUP)
    assert eventually(lambda: service.status_text == f"reloaded by {second}")
    assert eventually(lambda: kept(service) == kept_of(second)), kept(service)
    service.restart(service.command())
    assert eventually(lambda: not runs(second))


@pytest.mark.parametrize(
    ("flaw", "options", "code"),
    [
        ("exit", (), Code.ENDED_EARLY),
        ("", ("--listen", "more=unix:@more"), Code.LIMIT),
        pytest.param("blocking", (), Code.VERIFY_FAILED, marks=pytest.mark.matrix),
        pytest.param("hang", (), Code.NOT_READY_IN_TIME, marks=pytest.mark.matrix),
        pytest.param("", ("--check", "false"), Code.VERIFY_FAILED, marks=pytest.mark.matrix),
    ],
)
def test_a_live_upgrade_that_is_refused(
    service: RunnerService, flaw: str, options: tuple[str, ...], code: Code
) -> None:
    """Nothing of it is left when the caller is told, and the source has not noticed."""
    service.timeout = 10
    service.start(service.command())
    first = who(service)
    service.environment["FLAW"] = flaw
    with pytest.raises(ServiceError) as refused:
        service.live(service.command(*options))

    assert code == refused.value.code, refused.value
    assert [first] == programs()
    assert kept_of(first) == kept(service)
    assert {first} == {who(service) for _ in range(5)}


def programs() -> list[int]:
    """All programs that run."""
    return started(UNAWARE)


@pytest.mark.parametrize(
    "victim", ["destination", "takeover", pytest.param("program", marks=pytest.mark.matrix)]
)
def test_killed_while_it_prepares(service: RunnerService, victim: str) -> None:
    """Whoever of them dies, the program of the new version is ended, and the old one serves on."""
    service.start(service.command())
    first, runner = who(service), service.process
    assert runner
    service.environment["FLAW"] = "hang"
    upgrade = service.begin_live(service.command())
    assert eventually(lambda: len(programs()) == 2)
    second = next(pid for pid in programs() if pid != first)
    assert upgrade._takeover
    os.kill(
        {"destination": parent(second), "takeover": upgrade._takeover.pid, "program": second}[
            victim
        ],
        signal.SIGKILL,
    )
    with pytest.raises(ServiceError):
        upgrade.wait()

    assert eventually(lambda: programs() == [first])
    assert eventually(lambda: kept(service) == kept_of(first))
    assert first == who(service)
    service.environment.clear()
    service.live(service.command())
    another(service, first)


def test_the_source_is_killed_while_it_prepares(service: RunnerService) -> None:
    """Its program serves on; that of the new version is ended, at the latest by the next runner."""
    service.start(service.command())
    first = who(service)
    service.environment["FLAW"] = "hang"
    upgrade = service.begin_live(service.command())
    assert eventually(lambda: len(programs()) == 2)
    service.kill()
    takeover = upgrade._takeover
    assert takeover
    assert 1 == takeover.wait(SETTLE)
    service._over()
    assert first == who(service)
    service.environment.clear()
    service.start(service.command())
    third = another(service, first)
    assert eventually(lambda: programs() == [third])
    assert eventually(lambda: kept(service) == kept_of(third))


@pytest.mark.parametrize("comes", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_the_old_program_dies_while_another_one_prepares(
    service: RunnerService, comes: bool
) -> None:
    """If that has the listeners, it takes over, and clients wait for no more than that; if it is only
    tried, the unit fails and starts again."""
    service.timeout = 10
    service.start(service.command())
    first = who(service)
    upgrade = service.begin_live(service.command("--check", f"sleep {1 if comes else 600}"))
    prefix = "upgrader-entry-kept.program." if comes else "upgrader-entry-kept.trial."
    own = f"upgrader-entry-kept.program.{first}"
    assert eventually(lambda: any(name.startswith(prefix) for name in kept(service) if name != own))
    os.kill(first, signal.SIGKILL)
    if comes:
        upgrade.wait()
        assert eventually(lambda: kept(service) == kept_of(who(service)))
        return
    source = service.process
    with pytest.raises(ServiceError):
        upgrade.wait()
    assert source
    assert 1 == source.wait(SETTLE)
    service.kill()
    service.start(service.command())
    assert eventually(lambda: programs() == [who(service)])


def test_the_new_program_dies_right_after_the_commit(service: RunnerService) -> None:
    """Its runner fails; whom the old one serves is served on, and everybody else from the next start on."""
    service.start(service.command())
    with service.connect() as stream:
        assert "begun" == stream.ask("begin")
        service.live(service.command())
        old, second = service._replaced[-1], service.process
        assert second
        new = next(pid for pid in programs() if parent(pid) == second.pid)
        os.kill(new, signal.SIGKILL)
        assert 1 == second.wait(SETTLE)
        service.process = None
        service.start(service.command())
        assert eventually(lambda: parent(who(service)) == service.process.pid)  # type: ignore[union-attr]
        assert "ended" == stream.ask("end")
    assert 0 == old.wait(SETTLE)
    assert eventually(lambda: programs() == [who(service)])


def test_what_a_check_refuses_answers_nobody(service: RunnerService) -> None:
    """It is tried on listeners of its own first, whose addresses the check is told."""
    service.start(service.command())
    first = who(service)
    asked = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{address:main}')"
    good = ["--check", f'{sys.executable} -c "{asked}"']
    seen: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            seen.append(who(service))

    client = threading.Thread(target=ask)
    client.start()
    try:
        with pytest.raises(ServiceError, match="status 1"):
            service.live(service.command("--check", "sh -c 'sleep 0.3; false'"))
    finally:
        over.set()
        client.join(SETTLE)
    assert {first} == set(seen)
    service.live(service.command(*good))
    assert first != another(service, first)


def test_datagrams(service: RunnerService, tmp_path: Path) -> None:
    """The socket outlives programs, in a live upgrade and a restart; each datagram is answered once."""
    address = str(tmp_path / "datagrams")
    options = ("--datagrams", f"jobs=unix:{address}")
    seen: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(SETTLE)
        client.bind(str(tmp_path / "client"))

        def ask() -> int:
            client.sendto(b"%d" % len(seen), address)
            number, pid = map(int, client.recv(100).split())
            assert number == len(seen)
            seen.append(pid)
            return pid

        service.start(service.command(*options))
        first = ask()
        service.live(service.command(*options))
        assert eventually(lambda: ask() != first)
        assert eventually(lambda: not runs(first))
        second = ask()
        service.restart(service.command(*options))
        assert eventually(lambda: ask() not in (first, second))


def test_two_programs_are_drained_at_a_time(service: RunnerService) -> None:
    """With a third one, the oldest is ended; the others end after what they are at."""
    service.start(service.command())
    streams: list[tuple[int, Client]] = []
    try:
        for _ in range(3):
            client = service.connect()
            streams.append((int(client.ask("who")), client))
            assert "begun" == client.ask("begin")
            service.live(service.command())
            another(service, streams[-1][0])
        assert eventually(lambda: not runs(streams[0][0]))
        assert "" == streams[0][1].line()
        for pid, client in streams[1:]:
            assert runs(pid)
            assert "ended" == client.ask("end")
            assert eventually(lambda pid=pid: not runs(pid))  # type: ignore[misc]
    finally:
        for _, client in streams:
            client.__exit__()


def test_a_path_that_goes_away(service: RunnerService) -> None:
    """It is put back at once, while the program that serves goes on."""
    service.start(service.command())
    first = who(service)
    for _ in range(3):
        service.path.unlink()
        assert eventually(service.path.exists)
    other = service.path.with_name("other")
    other.touch()
    other.rename(service.path)
    assert eventually(service.path.is_socket)
    assert first == who(service)


def test_a_path_that_goes_away_between_two_runners(service: RunnerService) -> None:
    """The next one puts it back before it looks for its listener: clients of the old one come to it still."""
    service.start(service.command())
    first, inode = who(service), service.path.stat().st_ino
    service.stop()
    service.path.unlink()

    service.start(service.command())

    assert inode == service.path.stat().st_ino
    assert first != another(service, first)


def test_a_program_that_starts_its_own_successor(service: RunnerService) -> None:
    """The process that it calls its main one is the program from then on: for signals, for PID 1, and for the
    runner, which does not end with the first one."""
    service.start(service.command())
    first, runner = who(service), service.process
    assert runner
    with service.connect() as client:
        assert "started" == client.ask("again")
    second = another(service, first)
    assert eventually(lambda: kept_of(second)[0] in kept(service))
    os.kill(first, signal.SIGTERM)
    assert eventually(lambda: not runs(first))
    assert eventually(lambda: kept(service) == kept_of(second))
    runner.send_signal(signal.SIGHUP)
    assert eventually(lambda: service.status_text == f"reloaded by {second}")

    service.live(service.command())
    third = another(service, second)
    assert eventually(lambda: not runs(second))
    os.kill(third, signal.SIGKILL)
    assert service.process
    assert 1 == service.process.wait(SETTLE)
    service.kill()
