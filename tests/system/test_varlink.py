# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance's socket against systemd's own varlinkctl(1), and who may do what there."""

import json
import subprocess
from typing import Any

import pytest

from tests.support import eventually
from tests.system.reloading import live, reload, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import NOBODY
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol import varlink, varlink_interface

INSTANCE = varlink.INTERFACE
DESCRIPTIONS = {
    INSTANCE: varlink_interface.DESCRIPTION,
    varlink.SERVICE: varlink_interface.SERVICE_DESCRIPTION,
}


@pytest.fixture(scope="module")
def machine(trixie_machine: PrivateSystemd) -> PrivateSystemd:
    """A systemd that has varlinkctl (255 and later)."""
    return trixie_machine


@pytest.fixture
def service(machine: PrivateSystemd, install: Install) -> Service:
    """A service with a socket."""
    made = install(machine, "spoken", "holder", *live(machine, "spoken"))
    assert socket_there(made)
    return made


def varlinkctl(service: Service, *arguments: str, **more: Any) -> Any:
    """Run varlinkctl on the socket of a service: `varlinkctl VERB SOCKET ARGUMENTS`."""
    verb, *rest = arguments
    options = [each for each in rest if each.startswith("--")]
    rest = [each for each in rest if not each.startswith("--")]
    path = f"/run/{service.name}/upgrader.sock"
    command = ["varlinkctl", *options, verb, path, *rest]
    return service.machine.run(command, check=False, **more)


def called(service: Service, method: str, parameters: str = "{}") -> Any:
    done = varlinkctl(service, "call", f"{INSTANCE}.{method}", parameters, "--json=short")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_info_and_introspection(service: Service) -> None:
    """varlinkctl reads who we are and both interfaces, and finds nothing to complain about."""
    info = json.loads(varlinkctl(service, "info", "--json=short").stdout)
    interfaces = varlinkctl(service, "list-interfaces").stdout.split()

    assert "upgrader" == info["product"]
    assert {INSTANCE, varlink.SERVICE} == set(info["interfaces"]) == set(interfaces)
    for interface in interfaces:
        done = varlinkctl(service, "introspect", interface)
        assert (0, "") == (done.returncode, done.stderr)
        assert f"interface {interface}" in done.stdout
        service.machine.write("/run/described", DESCRIPTIONS[interface])
        checked = service.machine.run(["varlinkctl", "validate-idl", "/run/described"], check=False)
        assert (0, "") == (checked.returncode, checked.stderr)


def test_calls(service: Service) -> None:
    """Describe, parameters, and the errors of the standard interface."""
    described = called(service, "Describe")

    assert ("holder", 1, service.pid) == tuple(
        described[name] for name in ("service", "generation", "pid")
    )
    wanted = json.dumps(
        {"parameters": {"drain-timeout": "1min 30s", "backend-transfer.door": "no"}}
    )
    held = called(service, "SetParameters", wanted)["parameters"]
    assert ("1min 30s", "yes door=no") == (held["drain-timeout"], held["backend-transfer"])
    assert held == called(service, "Describe")["parameters"]
    assert "none" == called(service, "QueryMigration")["migration"]["phase"]
    for method, error in (
        (f"{INSTANCE}.Nonsense", "MethodNotFound"),
        ("io.upgrader.Nothing.Describe", "InterfaceNotFound"),
        (f"{INSTANCE}.Register", "InvalidParameter"),
        (f"{INSTANCE}.Migrate", "InvalidParameter"),
        (f"{INSTANCE}.Cancel", "NothingToCancel"),
    ):
        done = varlinkctl(service, "call", method, "{}")
        assert error in done.stderr, (method, done.stderr)
    wrong = json.dumps({"parameters": {"drain-timeout": "5s", "downtime-limit": "soon"}})
    done = varlinkctl(service, "call", f"{INSTANCE}.SetParameters", wrong)
    assert "InvalidParameter" in done.stderr
    assert "1min 30s" == called(service, "Describe")["parameters"]["drain-timeout"]


def test_phases_as_they_happen(service: Service) -> None:
    """QueryMigration with `more`: one reply a phase, the last one before the old process ends."""
    path = f"/run/{service.name}/upgrader.sock"
    command = ["varlinkctl", "--more", "--json=short", "call", path, f"{INSTANCE}.QueryMigration"]
    with service.machine.popen([*command, "{}"], stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        assert "none" == phase_of(watching.stdout.readline())["phase"]
        service.environment(ROUND="2")
        assert reload(service)
        told = [phase_of(line) for line in watching.stdout]

    assert ["setup", "collecting", "frozen", "loading", "committed", "done"] == [
        each["phase"] for each in told
    ]
    assert told[-1]["fds"] == 1
    assert 0 < told[-1]["pause"] < told[-1]["seconds"]
    assert watching.returncode == 0
    assert socket_there(service)
    assert eventually(lambda: called(service, "Describe")["generation"] == 2)
    assert "done" == called(service, "QueryMigration")["migration"]["phase"]


def phase_of(line: str) -> Any:
    """One reply; varlinkctl prints a JSON text sequence (RFC 7464) where there are several."""
    return json.loads(line.removeprefix("\x1e"))["migration"]


def test_a_busy_service_answers(machine: PrivateSystemd, install: Install) -> None:
    """A blocking service in the middle of its work is asked all the same."""
    more = live(machine, "engaged")
    service = install(machine, "engaged", "holder", *more)
    assert socket_there(service)
    with service.connect() as client:
        client.send("block 5\n")
        assert eventually(lambda: called(service, "Describe")["backends"][0]["busy"] == 1)
        assert "done" == client.line()


def test_who_may_steer(service: Service, machine: PrivateSystemd, install: Install) -> None:
    """The service's own user may ask, and steer nothing; others may not even ask."""
    assert "Permission denied" in varlinkctl_as_nobody(service, "Describe")
    own = install(
        machine, "unprivileged", "holder", *live(machine, "unprivileged"),
        "User=nobody", "Group=nogroup", "AmbientCapabilities=CAP_DAC_READ_SEARCH",
    )  # fmt: skip
    assert socket_there(own)

    assert '"generation":1' in varlinkctl_as_nobody(own, "Describe").replace(" ", "")
    for method in ("Cancel", "Expect"):
        assert "PermissionDenied" in varlinkctl_as_nobody(own, method)
    assert "PermissionDenied" in varlinkctl_as_nobody(own, "SetParameters", '{"parameters":{}}')
    assert "not the control process" in varlinkctl_as_nobody(own, "Register", '{"pid":1}')
    assert "not the control process" in varlinkctl_as_nobody(own, "Reload")


def varlinkctl_as_nobody(service: Service, method: str, parameters: str = "{}") -> str:
    """What an unprivileged user is told: the answer, or the error."""
    program = (
        "import json, socket\n"
        "from upgrader.protocol.varlink_client import call\n"
        "try:\n"
        "    with socket.socket(socket.AF_UNIX) as sock:\n"
        f"        sock.connect('/run/{service.name}/upgrader.sock')\n"
        f"        print(json.dumps(call(sock, '{INSTANCE}.{method}', {parameters})))\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    python = service.machine.python
    return service.machine.run([*NOBODY, *python, "-c", program]).stdout
