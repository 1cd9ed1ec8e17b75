# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong in a live upgrade of a program behind a runner, and `kill -9` of everybody at each step:
what clients lose, what the caller is told, and that every process is the owner's afterwards; in tables."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import SETTLE, eventually
from tests.system.program_clients import Load, load, version
from tests.system.program_texts import KINDS
from tests.system.programs import command_line, program, stored, write_version
from tests.system.reloading import processes
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd

ADAPTER = Path(__file__).parent / "services" / "stops_at.py"
#: For each program: what it cannot start with.
NONSENSE = {"nginx": "nonsense;", "haproxy": "nonsense\n", "gunicorn": "nonsense("}
#: Where the new runner waits: before it starts the program, when that was started, is ready and checked; when
#: Go has come and everything is loaded; and when it is the owner. In `go` and `acked` it has gone on from the
#: step before, and the old runner is stopped: it has not sent Go yet, or not seen the Ack.
STEPS = {
    "prepare": "prepare", "started": "started", "ready": "ready", "checked": "checked",
    "go": "checked", "loaded": "loaded", "acked": "loaded", "committed": "committed",
}  # fmt: skip
VICTIMS = ("new runner", "new program", "takeover", "old runner", "old program")
#: Those that serve clients, whom their death cuts.
PROGRAMS = ("new program", "old program")


def rows_of(name: str, head: Sequence[str]) -> Iterator[list[list[str]]]:
    """Rows of a table, which is published if there are any."""
    rows: list[list[str]] = []
    yield rows
    if rows:
        publish(name, head, sorted(rows))


@pytest.fixture(scope="module")
def failures_table() -> Iterator[list[list[str]]]:
    head = ["program", "what goes wrong", "the caller is told", "answers", "failed", "longest wait"]
    yield from rows_of("program faults", head)


@pytest.fixture(scope="module")
def kills_table() -> Iterator[list[list[str]]]:
    head = [
        "program",
        "at",
        "killed",
        "the caller is told",
        "serves",
        "answers",
        "failed",
        "longest wait",
    ]
    yield from rows_of("program kills", head)


def made(machine: PrivateSystemd, install: Install, kind: str) -> Service:
    """A program that runs."""
    service = program(machine, install, kind)
    service.start()
    assert eventually(lambda: answers(service)), service.messages()
    return service


def answers(service: Service) -> bool:
    with suppress(OSError, ValueError):
        return version(service) > 0
    return False


def seen_by(seen: Load) -> list[str]:
    return [str(seen.answers), str(len(seen.failures)), f"{seen.longest * 1000:.0f} ms"]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(NONSENSE))
@pytest.mark.parametrize("fault", ["cannot start", "fails its check", "hangs", "crashes after"])
def test_what_goes_wrong(
    host_machine: PrivateSystemd,
    install: Install,
    kind: str,
    fault: str,
    failures_table: list[list[str]],
) -> None:
    """The clients of the old program notice nothing, and afterwards every process is the owner's."""
    service = made(host_machine, install, kind)
    plain = lines(service)
    write_version(service, kind, 2)
    if fault == "cannot start":
        file = KINDS[kind].file.replace("@NAME@", service.name)
        path = file if file.startswith("/") else f"/srv/{service.name}/{file}"
        service.machine.write(path, NONSENSE[kind])
    check = {"fails its check": "--check false", "hangs": "--ready notify --check 'sleep 600'"}
    service.configure(
        *(line.replace(" -- ", f" {check.get(fault, '')} -- ") for line in plain),
        *(["Environment=UPGRADER_MIGRATION_TIMEOUT=3s"] if fault == "hangs" else []),
    )
    with load(service, listeners=KINDS[kind].listeners) as seen:
        said = upgrade(service, "--mode", "live")
        if fault == "crashes after":
            assert 0 == said["exit_code"], said
            time.sleep(2)  # the crash that the case is about comes so late
            kill(service, only_child(service, service.pid))
            service.until(ActiveState="active", SubState="running", NRestarts="1")
        else:
            assert 0 != said["exit_code"], said
        assert eventually(lambda: owns_all(service)), lines_of(service)
        assert eventually(lambda: answers(service))
    failures_table.append([kind, fault, str(said["code"] or said["result"]), *seen_by(seen)])
    assert len(seen.failures) <= (len(KINDS[kind].listeners) if fault == "crashes after" else 0)
    assert eventually(lambda: service.stored == stored(kind))
    service.configure(*plain)
    write_version(service, kind, 3)
    assert 0 == upgrade(service, "--mode", "live")["exit_code"], service.messages()
    assert eventually(lambda: version(service) == 3)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(NONSENSE))
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step(
    host_machine: PrivateSystemd,
    install: Install,
    kind: str,
    step: str,
    kills_table: list[list[str]],
) -> None:
    """Only a program that dies takes clients with it, one answer each at most."""
    service = stopping(host_machine, install, kind)
    for number, victim in enumerate(VICTIMS):
        if (step, victim) != ("prepare", "new program"):
            told = killed(service, kind, step, victim, 2 * number + 2)
            kills_table.append([kind, step, victim, *told])


def test_killed_in_the_freeze(host_machine: PrivateSystemd, install: Install) -> None:
    """The new program, whose workers are there still, when its runner has loaded everything: it is refused,
    and nothing of it accepts any more."""
    killed(stopping(host_machine, install, "nginx"), "nginx", "loaded", "new program", 2)


def test_killed_once_it_has_committed(host_machine: PrivateSystemd, install: Install) -> None:
    """The new runner, before the old one knows: that leaves everything to the next one, and waits for nobody."""
    killed(stopping(host_machine, install, "nginx"), "nginx", "acked", "new runner", 2)


def stopping(machine: PrivateSystemd, install: Install, kind: str) -> Service:
    """A program whose runner waits where it is told."""
    machine.copy_in(ADAPTER, "/opt/stops/stops/at.py")
    service = program(machine, install, kind, "", "--adapter", "stops.at")
    patient = "Environment=UPGRADER_DOWNTIME_LIMIT=20s"  # time to play with in the freeze
    service.configure(*lines(service), "Environment=PYTHONPATH=/opt/stops", patient)
    service.start()
    assert eventually(lambda: answers(service)), service.messages()
    return service


def killed(service: Service, kind: str, step: str, victim: str, number: int) -> list[str]:
    """Upgrade to a version with this number and kill somebody meanwhile; what was told and seen."""
    write_version(service, kind, number)
    service.machine.run(["systemctl", "reset-failed", service.unit], check=False)
    with load(service, listeners=KINDS[kind].listeners) as seen:
        with Stopped.at(service, step) as stopped:
            pid = stopped.pids.get(victim) or only_child(service, stopped.pids["new runner"])
            kill(service, pid)
        said = stopped.said
        service.until(ActiveState="active", SubState="running")
        assert eventually(lambda: answers(service)), service.messages()
        assert eventually(lambda: owns_all(service)), lines_of(service)
        served = version(service)
    if said["result"] == "done":
        assert number == served, said
    if step == "committed" and victim not in PROGRAMS:
        assert number == served, said
    most = len(KINDS[kind].listeners) if victim in PROGRAMS else 0
    assert len(seen.failures) <= most, (step, victim, seen.failures)
    assert eventually(lambda: service.stored == stored(kind))
    assert eventually(service.answers)
    write_version(service, kind, number + 1)
    assert 0 == upgrade(service, "--mode", "live")["exit_code"], service.messages()
    assert eventually(lambda: version(service) == number + 1)
    assert eventually(lambda: owns_all(service)), lines_of(service)
    told = str(said["code"] or said["result"])
    return [told, "new" if served == number else "old", *seen_by(seen)]


@dataclass
class Stopped:
    """An upgrade whose new runner waits: who takes part in it, and what the caller was told at last."""

    service: Service
    pids: dict[str, int]
    said: dict[str, Any]
    _step: str

    @classmethod
    def at(cls, service: Service, step: str) -> "Stopped":
        return cls(service, {"old runner": service.pid}, {}, step)

    def _file(self, name: str) -> Path:
        return self.service.inside(f"/run/{self.service.name}/{name}")

    def __enter__(self) -> "Stopped":
        service, source = self.service, self.pids["old runner"]
        self.pids["old program"] = only_child(service, source)
        for name in ("mark", "go", "on"):
            self._file(name).unlink(missing_ok=True)
        self._file("step").write_text(STEPS[self._step])
        command = ["upgrader", "upgrade", "--json", "--mode", "live", service.unit]
        self._asked = service.machine.popen(command, stdout=subprocess.PIPE)
        assert eventually(self._file("mark").exists), service.messages()
        runners = [p for p in map(int, processes(service)) if is_runner(service, p)]
        (self.pids["new runner"],) = set(runners) - {source}
        self.pids["takeover"] = int(service.show("ControlPID")[0])
        self._file("step").unlink()
        if self._step in ("go", "acked"):
            service.machine.run(["kill", "-STOP", str(source)])
            self._file("go").touch()
            assert eventually(self._file("on").exists)
            time.sleep(0.2)  # nothing tells that it waits for the old one
        return self

    def __exit__(self, *_: object) -> None:
        self._file("go").touch()
        self.service.machine.run(["kill", "-CONT", str(self.pids["old runner"])], check=False)
        text, _ = self._asked.communicate(timeout=SETTLE * 3)
        self.said = json.loads(text)


def kill(service: Service, pid: int) -> None:
    assert pid > 0
    service.machine.run(["kill", "-KILL", str(pid)])


def lines(service: Service) -> list[str]:
    """The lines that a service has been configured with."""
    text = service.inside(f"/etc/systemd/system/{service.unit}").read_text()
    return [
        "ExecStart=",
        *text.partition("ExecStart=\n")[2].partition("\n\n[Install]")[0].splitlines(),
    ]


def is_runner(service: Service, pid: int) -> bool:
    return "upgrader.run" in command_line(service, pid)


def lines_of(service: Service) -> list[str]:
    """All command lines of the unit."""
    return [command_line(service, pid) for pid in processes(service)]


def only_child(service: Service, runner: int) -> int:
    """The program of a runner, once a command that tells its version has ended."""
    assert eventually(lambda: len(children(service, runner)) == 1), lines_of(service)
    (pid,) = children(service, runner)
    return pid


def children(service: Service, pid: int) -> set[int]:
    found = service.machine.run(["pgrep", "-P", str(pid)], check=False).stdout
    return set(map(int, found.split()))


def owns_all(service: Service) -> bool:
    """Whether all processes of the unit are the main process and below it."""
    owned, main = {service.pid}, service.pid
    new = {main}
    while new:
        new = set().union(*(children(service, pid) for pid in new)) - owned
        owned |= new
    return main > 0 and set(map(int, processes(service))) == owned
