# SPDX-License-Identifier: LGPL-2.1-or-later
"""nginx and others of the distribution, unmodified, behind a runner under a real systemd."""

import time
from pathlib import Path

import pytest

from tests.support import eventually
from tests.system.programs import (
    STREAM,
    get,
    gunicorn,
    load,
    masters,
    nginx,
    pid_file,
)
from tests.system.reloading import processes
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

ROOT = Path(__file__).resolve().parents[2]


def test_restarts_and_a_crash(host_machine: PrivateSystemd, install: Install) -> None:
    """The old nginx serves on until the new one does: no client is refused or cut, or waits."""
    service = nginx(host_machine, install, "ngrestart")
    service.start()
    with load(service, streams=2) as seen:
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
    service = nginx(host_machine, install, "ngstop")
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
    service = nginx(host_machine, install, "ngtmp")
    # This checkout may lie in /tmp itself.
    service.configure(*unit_lines(service), "PrivateTmp=yes", f"BindReadOnlyPaths={ROOT}")
    service.start()
    before = masters(service)
    with load(service) as seen:
        service.restart()
        assert before != masters(service)
        time.sleep(0.1)
    assert [] == seen.failures


@pytest.mark.matrix
def test_gunicorn(host_machine: PrivateSystemd, install: Install) -> None:
    """The same for gunicorn with two workers."""
    service = gunicorn(host_machine, install, "gurestart")
    service.start()
    with load(service) as seen:
        for _ in range(3):
            service.restart()
        service.signal("KILL")
        service.until(ActiveState="active", SubState="running", NRestarts="1")
    assert [] == seen.failures
    assert seen.longest < 2, seen.longest
