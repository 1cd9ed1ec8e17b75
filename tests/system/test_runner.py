# SPDX-License-Identifier: LGPL-2.1-or-later
"""nginx and others of the distribution, unmodified, behind a runner under a real systemd."""

import http.client
import time
from pathlib import Path

import pytest

from tests.support import eventually
from tests.system.program_clients import connect, get, load, version
from tests.system.program_texts import KINDS, STREAM
from tests.system.programs import (
    command_line,
    masters,
    needs,
    pid_file,
    program,
    stored,
    write_version,
)
from tests.system.reloading import processes
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

ROOT = Path(__file__).resolve().parents[2]


def test_restarts_and_a_crash(host_machine: PrivateSystemd, install: Install) -> None:
    """The old nginx serves on until the new one does: no client is refused or cut, or waits."""
    service = program(host_machine, install, "nginx", "ngrestart")
    service.start()
    with load(service, streams=2, listeners=("tcp", "unix")) as seen:
        service.restart()
        before = service.pid
        service.signal("KILL")
        assert eventually(lambda: service.pid not in (0, before))
        service.until(ActiveState="active", SubState="running", NRestarts="1")
    assert [] == seen.failures
    assert [STREAM, STREAM] == seen.streams
    assert seen.answers > 50
    assert seen.longest < 1, seen.longest
    assert eventually(lambda: len(masters(service)) == 1), masters(service)
    assert eventually(pid_file(service).exists)
    assert masters(service) == [int(pid_file(service).read_text())]


@pytest.mark.parametrize("state", ["serving", "stopped", "killed"])
def test_a_stop_leaves_nothing(host_machine: PrivateSystemd, install: Install, state: str) -> None:
    """Whatever the runner is able to do."""
    service = program(host_machine, install, "nginx", "ngstop")
    service.configure(*unit_lines(service), "TimeoutStopSec=2", "Restart=no")
    service.start()
    assert get(service)
    if state == "stopped":
        service.signal("STOP")
    elif state == "killed":
        service.signal("KILL")
        service.until(ActiveState="failed")

    service.stop()

    assert eventually(lambda: gone(service)), processes(service)
    with pytest.raises(ConnectionRefusedError):
        get(service)


def unit_lines(service: Service) -> list[str]:
    """The lines that a service has been configured with."""
    text = service.inside(f"/etc/systemd/system/{service.unit}").read_text()
    lines = text.partition("ExecStart=\n")[2].partition("\n\n[Install]")[0]
    return ["ExecStart=", *lines.splitlines()]


def gone(service: Service) -> bool:
    return not service.show("ControlGroup")[0] or not processes(service)


def test_where_a_program_cannot_outlive_the_stop(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """PrivateTmp= takes its files away: it is drained first, and clients wait for the next one."""
    service = program(host_machine, install, "nginx", "ngtmp")
    # This checkout may lie in /tmp itself.
    service.configure(*unit_lines(service), "PrivateTmp=yes", f"BindReadOnlyPaths={ROOT}")
    service.start()
    before = masters(service)
    with load(service) as seen:
        service.restart()
        assert before != masters(service)
        time.sleep(0.1)
    assert [] == seen.failures


def test_the_sample_of_nginx(host_machine: PrivateSystemd, install: Install) -> None:
    """Debian's configuration as it is: a start, a live upgrade, a stop."""
    needs("nginx")
    python = " ".join(host_machine.python)
    text = (ROOT / "units" / "nginx.service").read_text().replace("/usr/bin/python3", python)
    # The Python of the tests may lie in a home.
    text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
    host_machine.write("/etc/systemd/system/nginx.service", text)
    run = host_machine.run
    run(["systemctl", "daemon-reload"])
    try:
        run(["systemctl", "start", "nginx.service"])
        fetched = ["curl", "-sf", "-w", "%{http_code} ", "-o", "/dev/null", "http://127.0.0.1"]
        fetched += ["-o", "/dev/null", "http://[::1]"]
        assert ["200", "200"] == run(fetched).stdout.split()
        before = run(["cat", "/run/nginx.pid"]).stdout
        run(["upgrader", "upgrade", "--mode", "live", "nginx.service"])
        assert eventually(lambda: run(["cat", "/run/nginx.pid"]).stdout != before)
        assert ["200", "200"] == run(fetched).stdout.split()
        run(["upgrader", "upgrade", "--preflight", "nginx.service"])
    finally:
        run(["systemctl", "stop", "nginx.service"])
        run(["rm", "/etc/systemd/system/nginx.service"])
        run(["systemctl", "daemon-reload"])


def test_live_upgrades(host_machine: PrivateSystemd, install: Install) -> None:
    """Three of them under load, with streams open: nobody is refused or cut; the source's nginx serves
    until the new one does, is gone when its last stream has ended, and so is its runner."""
    service = program(host_machine, install, "nginx", "nglive")
    service.start()
    assert eventually(service.answers)
    with load(service, streams=2) as seen:
        for number in (2, 3, 4):
            write_version(service, "nginx", number)
            answer = upgrade(service, "--mode", "live")
            assert 0 == answer["exit_code"], answer
            assert eventually(lambda number=number: version(service) == number)  # type: ignore[misc]
    assert [] == seen.failures
    assert [STREAM, STREAM] == seen.streams
    assert seen.longest < 1, seen.longest
    assert eventually(lambda: len(masters(service)) == 1), masters(service)
    assert eventually(lambda: len(processes(service)) == 4), processes(service)
    assert masters(service) == [int(pid_file(service).read_text())]
    assert 4 == service.status.generation
    assert eventually(lambda: stored("nginx") == service.stored)


def test_a_configuration_that_does_not_parse(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """The new nginx ends at once; nothing is left of it, and the old one has not noticed."""
    service = program(host_machine, install, "nginx", "ngbad")
    service.start()
    assert eventually(service.answers)
    before = masters(service)
    service.machine.write(f"/etc/{service.name}.conf", "nonsense;")
    with load(service) as seen:
        assert "ended-early" == upgrade(service, "--mode", "live")["code"]
    assert [] == seen.failures
    assert before == masters(service)
    assert stored("nginx") == service.stored
    assert before == [int(pid_file(service).read_text())]


def test_a_stop_in_the_overlap(host_machine: PrivateSystemd, install: Install) -> None:
    """Neither version is left."""
    service = program(host_machine, install, "nginx", "ngover")
    service.configure(*unit_lines(service), "Environment=ROUND=2")
    service.start()
    assert eventually(service.answers)
    lines = [line.replace(" -- ", " --check 'sleep 600' -- ") for line in unit_lines(service)]
    service.configure(*lines)
    asked = service.machine.popen(["systemctl", "reload", service.unit])
    assert eventually(lambda: len(masters(service)) == 3), masters(service)

    service.stop()

    assert eventually(lambda: gone(service)), processes(service)
    assert eventually(lambda: asked.poll() is not None)


#: What those say that are told to end, and how many of their processes.
_DRAINS = {"puma": ("Gracefully stopping", 1), "uvicorn": ("Shutting down", 2)}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "listener"),
    [(kind, each) for kind in KINDS if KINDS[kind].settings[0] for each in KINDS[kind].listeners],
)
def test_who_was_accepted_is_answered(
    host_machine: PrivateSystemd, install: Install, kind: str, listener: str
) -> None:
    """By the old program, though the request comes only when it drains."""
    service = program(host_machine, install, kind, f"{kind}-{listener}")
    file, text = KINDS[kind].settings
    text = text.replace("sleep 1 ", "sleep 30 ").replace("else 1,", "else 30,")  # for slow machines
    service.machine.write(f"/srv/{service.name}/{file}", text)
    service.start()
    says, count = _DRAINS[kind.partition("-")[0]]
    with connect(service, listener) as waiting:
        assert 1 == version(service, listener)  # connections are accepted in order
        write_version(service, kind, 2)
        answer = upgrade(service, "--mode", "live")
        assert 0 == answer["exit_code"], answer
        assert eventually(lambda: service.messages().count(says) == count), service.messages()
        assert 2 == version(service, listener)
        waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with http.client.HTTPResponse(waiting) as response:
            response.begin()
            assert b"1" == response.read().split()[1]


@pytest.mark.parametrize(
    "victim",
    [
        "destination",
        *(pytest.param(who, marks=pytest.mark.matrix) for who in ("takeover", "source")),
    ],
)
def test_killed_in_the_overlap(host_machine: PrivateSystemd, install: Install, victim: str) -> None:
    """Whoever dies, clients see nothing, and afterwards every process is the owner's."""
    service = program(host_machine, install, "nginx", "ngkill")
    service.start()
    assert eventually(service.answers)
    source = service.pid
    plain = unit_lines(service)
    service.configure(*(line.replace(" -- ", " --check 'sleep 600' -- ") for line in plain))
    with load(service) as seen:
        asked = service.machine.popen(["systemctl", "reload", service.unit])
        assert eventually(lambda: len(masters(service)) == 3), masters(service)
        pids = {"source": source, "takeover": int(service.show("ControlPID")[0])}
        runners = [int(p) for p in processes(service) if "upgrader.run" in command_line(service, p)]
        pids["destination"] = next(pid for pid in runners if pid != source)
        service.configure(*plain)
        service.machine.run(["kill", "-KILL", str(pids[victim])])
        assert eventually(lambda: asked.poll() is not None)
        service.until(ActiveState="active", SubState="running")
        assert eventually(lambda: len(processes(service)) == 4), processes(service)
    assert [] == seen.failures
    assert eventually(lambda: stored("nginx") == service.stored)
    assert eventually(lambda: masters(service) == [int(pid_file(service).read_text())])
