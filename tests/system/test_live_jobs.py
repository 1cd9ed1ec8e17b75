# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live upgrades and what else PID 1 is asked for: before, in the middle, and after."""

import subprocess
import time

import pytest

from tests.support import SETTLE, eventually
from tests.system.reloading import alone, crowd, live, paused, processes, reload, socket_there
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=20s"


@pytest.fixture
def service(any_machine: PrivateSystemd, install: Install) -> Service:
    return install(any_machine, "jobs", "lively", *live(any_machine, "jobs"), PATIENT)


@pytest.mark.parametrize("step", ["import", "verify", "committed"])
@pytest.mark.parametrize("what", ["daemon-reload", "daemon-reexec"])
def test_pid_1_reads_its_units_anew(service: Service, what: str, step: str) -> None:
    """Whenever it does so, the upgrade goes on."""
    with crowd(service) as clients:
        with paused(service, "verify" if step == "committed" else step) as upgrade:
            if step == "committed":
                upgrade.signal("STOP", upgrade.source)
                upgrade.go()
                clients.is_served_by(2)
            service.machine.run(["systemctl", what])
            upgrade.signal("CONT", upgrade.source)
            upgrade.go()

            told = upgrade.wait()
            # systemctl loses its connection to a PID 1 that executes itself anew.
            assert told or what == "daemon-reexec", service.messages()
            assert eventually(lambda: upgrade.destination == service.pid), service.messages()
            service.until(SubState="running")
        clients.is_served_by(2)
        assert alone(service)
        service.restart()
        clients.is_served_by(3)


@pytest.mark.parametrize("step", ["import", "verify", "committed"])
def test_a_restart_in_the_middle(service: Service, step: str) -> None:
    """Whoever owns parks, and the next instance has everything."""
    if step == "committed" and service.machine.systemd_version < 254:
        # It takes no MAINPID= any more once a unit stops, so nobody else may be the one to park.
        service.configure(*live(service.machine, "jobs"), PATIENT, "NotifyAccess=all")
    with crowd(service) as clients:
        with paused(service, "verify" if step == "committed" else step) as upgrade:
            if step == "committed":
                upgrade.signal("STOP", upgrade.source)
                upgrade.go()
                clients.is_served_by(2)
            service.environment()
            service.restart()  # PID 1 sends SIGCONT after its SIGTERM
            upgrade.wait()  # its job has become part of the restart
        clients.is_served_by(3 if step == "committed" else 2)
        assert alone(service)


@pytest.mark.parametrize("step", ["import", "verify"])
def test_a_stop_in_the_middle(service: Service, step: str) -> None:
    """It is a stop: connections are closed, and nothing is left with PID 1."""
    with crowd(service) as clients:
        with paused(service, step) as upgrade:
            service.environment()
            service.stop()

            assert not upgrade.wait()
            assert {""} == {client.line() for client in clients.clients}
        service.until(ActiveState="inactive", NFileDescriptorStore="0")
    service.start()
    with service.connect() as client:
        assert (1, 1, 1) == client.add()


def test_a_cancelled_job(service: Service) -> None:
    """It ends the waiting, not the upgrade: what counts is which process is the main one."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            service.machine.run(["systemctl", "cancel"])
            assert not upgrade.wait()
            upgrade.go()

            assert eventually(lambda: upgrade.destination == service.pid)
        clients.is_served_by(2)
        assert alone(service)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(3)


def test_a_storm(service: Service) -> None:
    """Ten reloads at once end in one or two upgrades, and all are told that it went well."""
    with crowd(service) as clients:
        assert socket_there(service)
        service.environment(ROUND="2")
        reloads = [
            service.machine.popen(["systemctl", "reload", service.unit], stderr=subprocess.DEVNULL)
            for _ in range(10)
        ]

        assert {0} == {each.wait(SETTLE * 2) for each in reloads}, service.messages()

        generation = service.status.generation
        assert generation in (2, 3)
        clients.is_served_by(generation)
        assert alone(service)


def test_the_old_process_is_gone_at_once(service: Service) -> None:
    """With nothing to drain, it ends when PID 1 knows the new one: no later than the reload."""
    with crowd(service) as clients:
        assert socket_there(service)
        before = service.pid
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        ended = time.monotonic()
        assert eventually(lambda: str(before) not in processes(service))
        assert time.monotonic() - ended < 2  # ten times what is promised
        clients.is_served_by(2)


def test_a_stop_that_takes_its_time(service: Service) -> None:
    """The new main process is PID 1's own child: it is waited for, and is all there is."""
    with crowd(service) as clients:
        assert socket_there(service)
        service.environment(FLAW="slow-stop")
        assert reload(service), service.messages()
        clients.is_served_by(2)
        assert alone(service)
        shown = service.machine.run(["systemctl", "status", service.unit]).stdout
        assert f"Main PID: {service.pid}" in shown
        assert 'Status: "generation 2, loaded by live' in shown

        service.stop()

    assert "has taken its time" in service.messages()
    assert "not our child" not in service.messages()
    assert "SIGKILL" not in service.messages()
    service.until(Result="success")


def test_an_earlier_source_still_drains(any_machine: PrivateSystemd, install: Install) -> None:
    """A busy handler that may drain ends in the process that it began in, however many upgrades
    later."""
    service = install(
        any_machine, "drained", "lively", *live(any_machine, "drained"), "Environment=DRAINS=1"
    )
    with crowd(service) as clients, service.connect() as busy:
        busy.send("busy-until /run/drained/over\n")
        for generation in (2, 3):
            assert socket_there(service)
            service.environment(ROUND=str(generation))
            assert reload(service), service.messages()
            clients.is_served_by(generation)
        assert len(processes(service)) > 1
        service.machine.write("/run/drained/over", "")

        assert "done" == busy.line()
        assert "" == busy.line()
        assert alone(service)
        service.until(NRestarts="0", ActiveState="active")
