# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takeover is killed, told to stop, or stopped for too long at each step of an upgrade, and a
destination is stopped: what the operator is told is what the instances say."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import SETTLE, eventually
from tests.system.reloading import Crowd, Paused, alone, crowd, live, paused, socket_there
from tests.system.serving import Install, Service
from upgrader.codes import Code
from upgrader.lab.private_systemd import PrivateSystemd

#: Time to play with while the source is frozen.
PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=20s"
#: For what ends when it is over; a new version that gives way to all others needs some of it.
SHORT = "TimeoutStartSec=10"
UPGRADE = ("upgrader", "upgrade", "--json")
ACTS = ["KILL", "TERM", "STOP"]


@pytest.fixture
def service(host_machine: PrivateSystemd, install: Install) -> Service:
    made = install(host_machine, "ends", "lively", *live(host_machine, "ends"), PATIENT)
    assert socket_there(made)
    return made


def configure(service: Service, *more: str) -> None:
    """With these lines besides; the next start gets nothing of it."""
    service.configure(*live(service.machine, service.name), PATIENT, *more)


def ends(service: Service, pid: int, act: str) -> None:
    """Have takeover end in one of these ways; stopped, it is killed by PID 1 after TimeoutStartSec=."""
    service.machine.run(["kill", "-s", act, str(pid)])
    if act == "TERM":
        service.machine.run(["kill", "-s", "CONT", str(pid)], check=False)  # it may be gone


def limit(act: str) -> list[str]:
    """What must be in the unit for it to end like that."""
    return [SHORT] if act == "STOP" else []


def gone(service: Service) -> bool:
    """Whether the reload is over, for PID 1."""
    return eventually(lambda: service.show("ControlPID") == ["0"], SETTLE)


def is_told(service: Service, clients: Crowd, said: Any, code: Code | None) -> None:
    """The answer, the exit code and the hold are those of the decision that the instance keeps which
    serves; without a `code` the upgrade was committed."""
    assert eventually(service.answers)
    last = service.ask("Describe")["last"]
    hold = service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()
    told = said["result"], said["exit_code"], said["code"], hold

    if code is None:
        assert ("done", 0, None, False) == told, said["cause"]
        assert (said["upgrade"], "destination", "committed") == (
            last["id"], last["side"], last["decision"],
        )  # fmt: skip
    else:
        assert ("failed-old-serves", 1, code, code.suspects_version) == told, said["cause"]
        if last["id"]:  # none was registered, if takeover never came as far
            assert (said["upgrade"], "source", "aborted", code) == (
                last["id"], last["side"], last["decision"], last["code"],
            )  # fmt: skip
    clients.is_served_by(1 if code else 2)
    assert alone(service)
    configure(service)
    service.environment(ROUND="2")
    done = service.machine.run([*UPGRADE, service.unit], check=False)
    assert "done" == json.loads(done.stdout)["result"], done.stdout
    clients.is_served_by(2 if code else 3)


@pytest.mark.parametrize("act", ACTS)
def test_before_it_registers(service: Service, act: str) -> None:
    """Nothing has begun, and nothing can any more."""
    takeover = " ".join(service.machine.python) + " -m upgrader.takeover"
    first = f"ExecReload=/bin/sh -c 'kill -STOP $$$$; exec {takeover}'"
    configure(service, "ExecReload=", first, *limit(act))
    with crowd(service) as clients:
        with service.machine.popen([*UPGRADE, service.unit], stdout=subprocess.PIPE) as asked:
            assert eventually(lambda: service.show("ControlPID") != ["0"])
            (pid,) = map(int, service.show("ControlPID"))
            stat = service.inside(f"/proc/{pid}/stat")
            assert eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            ends(service, pid, act)
            said = json.loads(asked.communicate(timeout=SETTLE * 2)[0])

        is_told(service, clients, said, Code.TAKEOVER_GONE)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("KILL", Code.TAKEOVER_GONE),
        ("TERM", Code.TAKEOVER_STOPPED),
        ("STOP", Code.TAKEOVER_GONE),
    ],
)
@pytest.mark.parametrize("step", ["import", "verify"])
def test_before_the_ack(service: Service, step: str, act: str, code: Code) -> None:
    """The source serves on, and the new version is not at fault."""
    configure(service, *limit(act))
    with crowd(service) as clients:
        with paused(service, step, UPGRADE) as upgrade:
            ends(service, upgrade.takeover, act)
            said = upgrade.said()

        is_told(service, clients, said, code)


@contextlib.contextmanager
def source_stopped(upgrade: Paused) -> Iterator[None]:
    """The source does not see the Ack yet."""
    upgrade.signal("STOP", upgrade.source)
    yield
    assert gone(upgrade.service)
    upgrade.signal("CONT", upgrade.source)


@contextlib.contextmanager
def systemd_stopped(upgrade: Paused) -> Iterator[None]:
    """PID 1 does not hear of its new main process yet."""
    os.kill(upgrade.service.machine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(upgrade.service.machine.pid, signal.SIGCONT)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("stopped", [source_stopped, systemd_stopped])
def test_after_the_ack(
    service: Service, stopped: Callable[[Paused], contextlib.AbstractContextManager[None]], act: str
) -> None:
    """The new version serves, whatever became of the reload."""
    configure(service, *limit(act))
    with crowd(service) as clients:
        with paused(service, "verify", UPGRADE) as upgrade:
            with stopped(upgrade):
                upgrade.go()
                with service.connect() as other:
                    assert 2 == other.add()[2]
                    other.send("quit\n")
                ends(service, upgrade.takeover, act)
            said = upgrade.said()
        clients.others += 1
        words = service.messages(f"UPGRADER_ID={said['upgrade']}")
        assert "generation 2, loaded by live" in words
        assert "serves on" not in words

        is_told(service, clients, said, None)


@pytest.mark.parametrize("step", ["import", "verify"])
def test_a_destination_that_is_stopped(service: Service, step: str) -> None:
    """Beyond the deadline of takeover: it was not ready in time."""
    configure(service, SHORT)
    with crowd(service) as clients:
        with paused(service, step, UPGRADE) as upgrade:
            upgrade.signal("STOP", upgrade.destination)
            said = upgrade.said()
        assert "was not ready in time" in said["cause"]

        is_told(service, clients, said, Code.NOT_READY_IN_TIME)


@pytest.mark.parametrize("act", ["KILL", "TERM"])
def test_a_bare_reload(service: Service, act: str) -> None:
    """Nobody waits for it but systemctl: the source decides all the same, and says how."""
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            ends(service, upgrade.takeover, act)
            assert not upgrade.wait()
            upgrade.go()
            assert eventually(lambda: service.ask("Describe")["last"]["decision"] == "aborted")
            code = service.ask("Describe")["last"]["code"]

        assert {"KILL": Code.TAKEOVER_GONE, "TERM": Code.TAKEOVER_STOPPED}[act] == code
        clients.is_served_by(1)
