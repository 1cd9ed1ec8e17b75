# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unmodified programs behind a runner, under load: upgrades, restarts, crashes, and what goes wrong in an
upgrade; in tables."""

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import eventually
from tests.system.programs import (
    OTHERS,
    STREAM,
    command_line,
    configure_nginx,
    load,
    nginx,
    other,
    version,
    write_version,
)
from tests.system.reloading import processes
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.programs import known

pytestmark = pytest.mark.matrix
UPGRADES, RESTARTS = 10, 5
#: One that, told to end, closes what it has just accepted and not read yet.
CLOSING = ("uvicorn",)
Made = tuple[Service, Callable[[int], None]]


@pytest.fixture(scope="module")
def programs_table() -> Iterator[list[list[str]]]:
    """Rows for what is done with each program."""
    rows: list[list[str]] = []
    yield rows
    head = [
        "program",
        "upgrades",
        "restarts",
        "crashes",
        "answers",
        "failed",
        "failed in 10 reloads of its own",
        "streams cut",
        "longest wait",
    ]
    publish("programs", head, sorted(rows))


@pytest.fixture(scope="module")
def failures_table() -> Iterator[list[list[str]]]:
    """Rows for what goes wrong with each program."""
    rows: list[list[str]] = []
    yield rows
    head = ["program", "what goes wrong", "the caller is told", "answers", "failed", "longest wait"]
    publish("program faults", head, sorted(rows))


def made(machine: PrivateSystemd, install: Install, kind: str) -> Made:
    """A program that runs, and how to write its next version."""
    if kind == "nginx":
        service = nginx(machine, install, "othernginx")
    else:
        service = other(machine, install, kind)
    service.start()
    assert eventually(lambda: answers(service)), service.messages()
    if kind == "nginx":
        return service, lambda number: configure_nginx(service, number)
    return service, lambda number: write_version(service, kind, number)


def own_reloads(service: Service, kind: str) -> str:
    """How many requests fail while the program reloads itself as often as it was upgraded."""
    reload = known(kind).reload
    if reload is None:
        return ""
    with load(service) as seen:
        for _ in range(UPGRADES):
            service.signal(reload.name.removeprefix("SIG"))
            time.sleep(0.5)  # nothing tells the end of all of them
    return str(len(seen.failures))


def answers(service: Service) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return version(service) > 0
    return False


@pytest.mark.parametrize("kind", ["nginx", *sorted(OTHERS)])
def test_a_program_under_load(
    host_machine: PrivateSystemd, install: Install, kind: str, programs_table: list[list[str]]
) -> None:
    """Live upgrades, restarts and a crash of the runner: nobody is refused, and no stream is cut."""
    service, write = made(host_machine, install, kind)
    streams = 4 if kind == "nginx" else 0
    with load(service, streams=streams) as seen:
        for number in range(2, 2 + UPGRADES):
            write(number)
            said = upgrade(service, "--mode", "live")
            assert 0 == said["exit_code"], (said, service.messages())
            assert eventually(lambda number=number: version(service) == number)  # type: ignore[misc]
        generation = service.status.generation
        for _ in range(RESTARTS):
            service.restart()
        service.signal("KILL")
        service.until(ActiveState="active", SubState="running", NRestarts="1")
        assert eventually(lambda: answers(service))
    own = own_reloads(service, kind)
    cut = len([each for each in seen.streams if each != STREAM]) + streams - len(seen.streams)
    programs_table.append(
        [
            kind, str(UPGRADES), str(RESTARTS), "1", str(seen.answers), str(len(seen.failures)),
            own, f"{cut} of {streams}" if streams else "", f"{seen.longest * 1000:.0f} ms",
        ]
    )  # fmt: skip
    assert UPGRADES + 1 == generation
    assert 0 == cut
    assert len(seen.failures) <= (UPGRADES + RESTARTS + 1 if kind in CLOSING else 0), seen.failures
    assert eventually(lambda: 2 == service.stored)


#: For each program: what it cannot start with.
NONSENSE = {"nginx": "nonsense;", "haproxy": "nonsense\n", "gunicorn": "nonsense("}
#: What is killed while the new program is ready and checked, and what the caller is told.
VICTIMS = ["new runner", "new program", "takeover", "old runner", "old program"]


@pytest.mark.parametrize("kind", sorted(NONSENSE))
@pytest.mark.parametrize(
    "fault", ["cannot start", "fails its check", "hangs", "crashes after", *VICTIMS]
)
def test_what_goes_wrong(
    host_machine: PrivateSystemd,
    install: Install,
    kind: str,
    fault: str,
    failures_table: list[list[str]],
) -> None:
    """The clients of the old program notice nothing, and afterwards every process is the owner's."""
    service, write = made(host_machine, install, kind)
    plain = lines(service)
    write(2)
    if fault == "cannot start":
        path = f"/etc/{service.name}.conf" if kind == "nginx" else None
        path = path or f"/srv/{service.name}/{OTHERS[kind][0]}"
        service.machine.write(path, NONSENSE[kind])
    check = {"fails its check": "--check false", "hangs": "--ready notify --check 'sleep 600'"}
    check |= dict.fromkeys(VICTIMS, "--check 'sleep 600'")
    if fault in ("hangs", *VICTIMS):
        check[fault] += " --pass nginx" if kind == "nginx" else ""
    option = check.get(fault, "")
    service.configure(
        *(line.replace(" -- ", f" {option} -- ") for line in plain),
        *(["Environment=UPGRADER_MIGRATION_TIMEOUT=3s"] if fault == "hangs" else []),
    )
    with load(service) as seen:
        told = provoke(service, fault, plain)
        assert eventually(lambda: owns_all(service)), lines_of(service)
        assert eventually(lambda: answers(service))
    failures_table.append(
        [
            kind, fault, told, str(seen.answers), str(len(seen.failures)),
            f"{seen.longest * 1000:.0f} ms",
        ]
    )  # fmt: skip
    if fault != "crashes after":
        assert [] == seen.failures
    assert eventually(lambda: 2 == service.stored)
    service.configure(*plain)
    write(3)
    assert 0 == upgrade(service, "--mode", "live")["exit_code"], service.messages()
    assert eventually(lambda: version(service) == 3)


def provoke(service: Service, fault: str, plain: list[str]) -> str:
    """Upgrade, and have it go wrong; returns what the caller is told."""
    if fault in VICTIMS:
        source = service.pid
        program = program_of(service, source)
        asked = service.machine.popen(["systemctl", "reload", service.unit])
        assert eventually(lambda: "sleep 600" in lines_of(service))
        runners = [p for p in map(int, processes(service)) if is_runner(service, p)]
        destination = next(pid for pid in runners if pid != source)
        victims = {
            "new runner": destination,
            "new program": program_of(service, destination),
            "takeover": int(service.show("ControlPID")[0]),
            "old runner": source,
            "old program": program,
        }
        service.configure(*plain)
        service.machine.run(["kill", "-KILL", str(victims[fault])])
        assert eventually(lambda: asked.poll() is not None)
        service.until(ActiveState="active", SubState="running")
        return f"reload: exit code {asked.returncode}"
    said = upgrade(service, "--mode", "live")
    if fault == "crashes after":
        assert 0 == said["exit_code"], said
        time.sleep(2)  # the crash that the case is about comes so late
        service.machine.run(["kill", "-KILL", str(program_of(service, service.pid))])
        service.until(ActiveState="active", SubState="running", NRestarts="1")
    else:
        assert 0 != said["exit_code"], said
    return str(said["code"] or said["result"])


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


def program_of(service: Service, runner: int) -> int:
    """The program of a runner, which may run a check as well."""
    return next(p for p in children(service, runner) if command_line(service, p) != "sleep 600")


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
