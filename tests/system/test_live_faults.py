# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bad versions, and every process killed at every step of a live upgrade: clients lose nothing."""

import re
import time

import pytest

from tests.support import eventually
from tests.system.reloading import (
    Crowd,
    alone,
    crowd,
    kill_after_the_commit,
    live,
    paused,
    reload,
    socket_there,
)
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

#: Time to play with while the source is frozen.
PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=20s"


@pytest.fixture
def service(host_machine: PrivateSystemd, install: Install) -> Service:
    return install(host_machine, "faulty", "lively", *live(host_machine, "faulty"), PATIENT)


def still_served(service: Service, clients: Crowd, before: int) -> None:
    """As if nothing had happened, and the next good version goes in without further ado."""
    assert before == service.pid
    clients.is_served_by(1)
    assert alone(service)
    service.environment(ROUND="2")
    assert reload(service), service.messages()
    clients.is_served_by(2)
    assert alone(service)


@pytest.mark.parametrize(
    ("setting", "flaw", "reason"),
    [
        ("ExecStart=\nExecStart=/usr/bin/no-such-program", "", "no-such-program: No such file"),
        ("", "exit", "has ended before it was ready"),
        ("", "less", "listener 'door' is not declared by the new version"),
        ("", "wrong", "not upgraded, the running instance serves on: DeclarationError: state"),
        ("LimitNOFILE=16", "", "raise LimitNOFILE="),
    ],
)
def test_a_bad_version(service: Service, setting: str, flaw: str, reason: str) -> None:
    """It is refused, and the journal says why."""
    with crowd(service, 20) as clients:
        assert socket_there(service)
        before = service.pid
        service.environment(FLAW=flaw)
        service.configure(*live(service.machine, "faulty"), setting)

        assert not reload(service)

        assert reason in service.messages(), service.messages()
        service.configure(*live(service.machine, "faulty"), PATIENT)
        still_served(service, clients, before)


@pytest.mark.parametrize("step", ["import", "verify"])
@pytest.mark.parametrize("victim", ["destination", "takeover"])
def test_killed_before_the_commit(service: Service, step: str, victim: str) -> None:
    """Whoever of the two dies, the source serves on."""
    with crowd(service) as clients:
        with paused(service, step) as upgrade:
            upgrade.signal("KILL", getattr(upgrade, victim))

            assert not upgrade.wait()
            assert eventually(lambda: clients_can_ask(service))
        still_served(service, clients, upgrade.source)


def clients_can_ask(service: Service) -> bool:
    with service.connect() as client:
        client.send("threads\n")
        return client.line() != ""


@pytest.mark.parametrize("step", ["import", "verify"])
def test_takeover_is_timed_out(host_machine: PrivateSystemd, install: Install, step: str) -> None:
    """Stopped, it cannot give up by itself: PID 1 kills it, and nothing is committed after that."""
    more = [*live(host_machine, "late"), PATIENT, "TimeoutStartSec=2"]
    service = install(host_machine, "late", "lively", *more)
    with crowd(service) as clients:
        with paused(service, step) as upgrade:
            upgrade.signal("STOP", upgrade.takeover)

            assert not upgrade.wait()
            upgrade.go()
            assert eventually(lambda: clients_can_ask(service))
        still_served(service, clients, upgrade.source)


def test_a_destination_that_is_stopped(host_machine: PrivateSystemd, install: Install) -> None:
    """takeover gives up in time, and kills it."""
    more = [*live(host_machine, "stopped"), "TimeoutStartSec=5"]
    service = install(host_machine, "stopped", "lively", *more)
    with crowd(service) as clients:
        with paused(service, "import") as upgrade:
            upgrade.signal("STOP", upgrade.destination)

            assert not upgrade.wait()
            code, message = told_by_takeover(service)
            assert "not-ready-in-time" == code
            assert "was not ready in time" in message
        still_served(service, clients, upgrade.source)


def told_by_takeover(service: Service) -> tuple[str, str]:
    """The code and the text of the last entry of takeover in the journal; it names an upgrade."""
    entry = service.journal("UPGRADER_SIDE=takeover")[-1]
    assert re.fullmatch(r"[0-9a-f]{32}", entry["UPGRADER_ID"])
    return entry["UPGRADER_CODE"], entry["MESSAGE"]


@pytest.mark.parametrize("step", ["import", "verify"])
def test_takeover_is_told_to_stop(service: Service, step: str) -> None:
    """Before the commit: it calls the upgrade off, and says that this is why."""
    with crowd(service) as clients:
        with paused(service, step) as upgrade:
            upgrade.signal("TERM", upgrade.takeover)

            assert not upgrade.wait()
            code, message = told_by_takeover(service)
            assert "takeover-stopped" == code
            assert "not upgraded" in message
            assert "takeover was told to stop" in message
        still_served(service, clients, upgrade.source)


def test_takeover_is_told_to_stop_after_the_commit(service: Service) -> None:
    """Nothing is called off, and nobody is told so; the source names its successor."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            upgrade.signal("STOP", upgrade.source)
            upgrade.go()
            clients.is_served_by(2)
            before = service.messages().count("not upgraded")
            upgrade.signal("TERM", upgrade.takeover)

            assert not upgrade.wait()
            assert before == service.messages().count("not upgraded")
            assert "the new version has taken over" in told_by_takeover(service)[1]
            upgrade.signal("CONT", upgrade.source)
            assert eventually(lambda: upgrade.destination == service.pid)
        clients.is_served_by(2)
        assert alone(service)


def test_the_last_words_of_takeover_are_the_unit_s(service: Service) -> None:
    """Also if takeover has ended long before journald gets to them, and cannot look up whose they are."""
    assert socket_there(service)
    service.configure(*live(service.machine, "faulty"), "ExecStart=", "ExecStart=/no-such-program")
    journald = ["systemctl", "kill", "systemd-journald.service", "--signal"]
    service.machine.run([*journald, "STOP"])
    try:
        assert not reload(service)
    finally:
        service.machine.run([*journald, "CONT"])

    assert "not upgraded, the running instance serves on" in service.messages()


def test_the_source_dies_before_its_image_is_out(service: Service) -> None:
    """Connections are lost with it, as in any crash; the listener is not, and nothing hangs."""
    with crowd(service) as clients:
        with paused(service, "import") as upgrade:
            service.environment()
            upgrade.signal("KILL", upgrade.source)
            upgrade.go()

            assert not upgrade.wait()
            assert {""} == {client.line() for client in clients.clients}
            service.until(ActiveState="active", NRestarts="1")
        assert alone(service)
        with service.connect() as client:
            assert (1, 1, 1) == client.add()


def test_the_source_dies_when_its_image_is_out(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """The destination has everything, and takeover has PID 1 take it as the main process. For PID 1
    the service has failed all the same: it is stopped, parks, and Restart= brings all back."""
    service = install(any_machine, "orphan", "lively", *live(any_machine, "orphan"), PATIENT)
    with crowd(service) as clients, paused(service, "verify") as upgrade:
        service.environment()
        upgrade.signal("KILL", upgrade.source)
        upgrade.go()

        assert not upgrade.wait()
        is_back(service, clients)


def test_the_source_dies_after_the_commit(any_machine: PrivateSystemd, install: Install) -> None:
    """Stopped before it could name its successor: takeover does it, and all goes on as above."""
    service = install(any_machine, "orphan", "lively", *live(any_machine, "orphan"), PATIENT)
    with crowd(service) as clients, paused(service, "verify") as upgrade:
        upgrade.signal("STOP", upgrade.source)
        upgrade.go()
        clients.is_served_by(2)
        service.environment()
        # PID 1 learns of its death first; else nothing of all this is noticed.
        upgrade.signal("STOP", upgrade.takeover)
        upgrade.signal("KILL", upgrade.source)
        service.until(MainPID="0")
        upgrade.signal("CONT", upgrade.takeover)

        assert not upgrade.wait()
        is_back(service, clients)


def is_back(service: Service, clients: Crowd) -> None:
    """The next instance has loaded what the destination parked, and is like any other."""
    service.until(ActiveState="active", NRestarts="1")
    clients.is_served_by(3)
    assert Origin.RESTART is service.status.origin
    assert alone(service)
    assert socket_there(service)
    service.environment(ROUND="2")
    assert reload(service), service.messages()
    clients.is_served_by(4)


def test_takeover_dies_after_the_commit(service: Service) -> None:
    """The source names its successor, whoever is left."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            upgrade.signal("STOP", upgrade.source)
            upgrade.go()
            clients.is_served_by(2)
            upgrade.signal("KILL", upgrade.takeover)
            assert not upgrade.wait()
            upgrade.signal("CONT", upgrade.source)

            assert eventually(lambda: upgrade.destination == service.pid)
        clients.is_served_by(2)
        assert alone(service)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(3)


def test_the_destination_dies_right_after_the_commit(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """The source finds it dead when it would name it: it parks what it still has, and Restart=
    brings everything back."""
    service = install(any_machine, "corpse", "lively", *live(any_machine, "corpse"), PATIENT)
    with crowd(service) as clients:
        kill_after_the_commit(service)
        assert Origin.RESTART is service.status.origin
        clients.is_served_by(2)
        assert alone(service)


def test_what_the_destination_has_forked(service: Service) -> None:
    """A process that outlives it holds nothing: no connection stays open, and nobody waits."""
    with crowd(service) as clients:
        assert socket_there(service)
        before = service.pid
        service.environment(FLAW="fork")

        assert not reload(service)

        assert "not upgraded" in service.messages()
        clients.is_served_by(1)
        leaver = clients.clients[0]
        leaver.send("d\nquit\n")
        leaver.line()
        assert "" == leaver.line()
        assert before == service.pid


def test_nobody_waits_for_a_destination_that_stalls(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """With everything loaded it says no more: the source serves again after `downtime-limit`, and
    no client has waited for much longer."""
    service = install(host_machine, "stall", "lively", *live(host_machine, "stall"))
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            began = time.monotonic()
            clients.is_served_by(1)

            assert time.monotonic() - began < 3  # ten times the limit
            assert not upgrade.wait()
        assert "no progress within 0.3 s" in service.messages()
        still_served(service, clients, upgrade.source)


def test_a_slow_destination_that_gets_on(host_machine: PrivateSystemd, install: Install) -> None:
    """Loading takes longer than the downtime limit, and says all the time that it goes on."""
    more = [*live(host_machine, "steady"), "Environment=UPGRADER_DOWNTIME_LIMIT=700ms"]
    service = install(host_machine, "steady", "lively", *more)
    with crowd(service, 40) as clients:
        assert socket_there(service)
        service.environment(FLAW="steady")

        assert reload(service), service.messages()

        clients.is_served_by(2)


def test_a_connection_closed_by_the_new_instance(service: Service) -> None:
    """Its client sees that at once, though the source still has a copy."""
    with crowd(service) as clients, paused(service, "verify") as upgrade:
        leaver = clients.clients[0]
        upgrade.signal("STOP", upgrade.source)
        upgrade.go()
        leaver.send("d\nquit\n")
        leaver.line()

        assert "" == leaver.line()
        upgrade.signal("CONT", upgrade.source)
        assert upgrade.wait()
