# SPDX-License-Identifier: LGPL-2.1-or-later
"""Version 0.1.0 of the library as the source, the destination and the tool, against this one: every
upgrade works, and each side is judged by what it says."""

import io
import json
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import cannot_run, eventually
from tests.system.reloading import live
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

ROOT = Path(__file__).resolve().parents[2]
_COMMIT = "e073940"
OLD, NEW = "/opt/upgrader-0.1.0", ""
#: All of source, destination and tool that are not of this version.
CROSSED = [
    (source, destination, tool)
    for source in (OLD, NEW)
    for destination in (OLD, NEW)
    for tool in (OLD, NEW)
    if OLD in (source, destination, tool)
]


def named(place: str) -> str:
    return "old" if place == OLD else "new"


IDS = ["-".join(map(named, places)) for places in CROSSED]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of version 0.1.0 installs."""
    place = tmp_path_factory.mktemp("v0.1.0")
    archive = subprocess.run(
        ["git", "archive", _COMMIT], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        cannot_run(f"the history of this checkout does not reach {_COMMIT}, version 0.1.0")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
        tree.extractall(place / "tree", filter="data")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=place / "tree", capture_output=True, check=True)
    (built,) = place.glob("*.whl")
    with zipfile.ZipFile(built) as files:
        files.extractall(place / "library")
    return place / "library"


@pytest.fixture
def machine(host_machine: PrivateSystemd, wheel: Path) -> PrivateSystemd:
    """A machine that has both versions."""
    if host_machine.run(["test", "-d", OLD], check=False).returncode:
        host_machine.copy_in(wheel, OLD)
    return host_machine


def installed(
    machine: PrivateSystemd,
    install: Install,
    name: str,
    place: str,
    *more: str,
    program: str = "crossing",
) -> Service:
    """A service that runs with one version of the library."""
    lines = [*live(machine, name), f"Environment=PYTHONPATH={place}", *more]
    service = install(machine, name, program, *lines)
    assert eventually(service.inside(f"/run/{name}/upgrader.sock").exists)
    return service


def upgrade(service: Service, place: str, *more: str) -> Any:
    """What `upgrader upgrade --json` of one version says."""
    command = ["env", f"PYTHONPATH={place}", "upgrader", "upgrade", service.unit, "--json", *more]
    return json.loads(service.machine.run(command, check=False).stdout)


def runs(service: Service) -> str:
    """With which version the instance runs that serves."""
    assert eventually(service.answers)
    return NEW if service.ask("Describe").get("interface") else OLD


def into(service: Service, mode: str, place: str, **variables: str) -> Sequence[str]:
    """Have the next version run with one version of the library; what to tell the tool."""
    variables["PYTHONPATH"] = place
    service.environment(**variables)
    if mode != "exec":
        return ["--mode", mode]
    values = [f"{name}={value}" for name, value in variables.items()]
    program = ["/usr/bin/env", *values, *service.machine.python, "/opt/upgrader-tests/crossing.py"]
    return ["--mode", mode, "--exec-command", shlex.join(program)]


@pytest.mark.parametrize("mode", ["live", "restart", "exec"])
@pytest.mark.parametrize(("source", "destination", "tool"), CROSSED, ids=IDS)
def test_a_good_version(
    machine: PrivateSystemd, install: Install, source: str, destination: str, tool: str, mode: str
) -> None:
    """Done, by all that anybody says; the connection and the counts are there, and so is the way
    back."""
    service = installed(machine, install, f"cross-{mode}", source)
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        assert source == runs(service)

        said = upgrade(service, tool, *into(service, mode, destination))

        assert ("done", mode, 0) == (said["result"], said["mode"], said["exit_code"]), said
        assert (mode, 1, 2) == (
            said["after"]["origin"],
            said["after"]["source_generation"],
            said["after"]["generation"],
        )
        assert (2, 2, 2) == client.add()
        assert destination == runs(service)
        said = upgrade(service, tool, *into(service, mode, source))
        assert "done" == said["result"], said
        assert (3, 3, 3) == client.add()


@pytest.mark.parametrize(("source", "destination", "tool"), CROSSED, ids=IDS)
def test_a_bad_version(
    machine: PrivateSystemd, install: Install, source: str, destination: str, tool: str
) -> None:
    """Refused live, with its reason and a hold, whoever knows no code; a preflight says the same,
    and that a good one would take over."""
    service = installed(machine, install, "crossbad", source)
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        into(service, "live", destination, MODE="refusing")

        said = upgrade(service, tool, "--mode", "live")

        assert ("failed-old-serves", 1, True) == (
            said["result"],
            said["exit_code"],
            said["bad_version"],
        ), said
        assert "not with me" in said["cause"]
        assert service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()
        said = upgrade(service, tool, "--mode", "live", "--preflight")
        assert "not with me" in said["cause"]
        assert (2, 2, 1) == client.add()
        into(service, "live", destination)
        said = upgrade(service, tool, "--mode", "live")
        assert "done" == said["result"], said
        assert (3, 3, 2) == client.add()


def test_what_an_old_instance_does_not_say(machine: PrivateSystemd, install: Install) -> None:
    """Takeover is killed: whether that is the end of it, a source of version 0.1.0 does not say. The
    exit code is one of its own, there is no hold, and the next upgrade works."""
    service = installed(machine, install, "crossdead", OLD)
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        service.environment(PYTHONPATH=NEW, MODE="hang")
        command = ["upgrader", "upgrade", service.unit, "--json"]
        with machine.popen(command, stdout=subprocess.PIPE) as asked:
            assert eventually(lambda: service.show("ControlPID") != ["0"])
            assert eventually(lambda: service.ask("Describe")["migration"]["phase"] == "setup")
            machine.run(["kill", "-KILL", *service.show("ControlPID")])
            said = json.loads(asked.communicate(timeout=60)[0])

        assert ("undecided", 5) == (said["result"], said["exit_code"]), said
        assert "unknown (library 0.1.0" in said["cause"]
        assert not service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()
        service.environment(PYTHONPATH=NEW)
        said = upgrade(service, NEW)
        assert "done" == said["result"], said
        assert (2, 2, 2) == client.add()


def test_a_downgrade_of_backends_of_other_kinds(machine: PrivateSystemd, install: Install) -> None:
    """To version 0.1.0, which knows none: live it is refused by name, a restart into it keeps the
    image, which it refuses by number, and after a crash it lets go of what it does not know, and
    serves."""
    service = installed(machine, install, "crosskinds", NEW, program="kinds")
    service.environment(BACKENDS="yes")
    assert "done" == upgrade(service, NEW, "--mode", "restart")["result"]
    with service.connect() as client:
        assert client.ask("count").startswith("1 1 2 1")
    service.environment(PYTHONPATH=OLD)
    said = upgrade(service, NEW, "--mode", "live")
    assert "failed-old-serves" == said["result"], said
    assert "memory 'memory'" in said["cause"]
    assert "reads image format [1], and this needs format 2" in said["cause"]

    assert "not-serving" == upgrade(service, NEW, "--mode", "restart")["result"]
    assert "format 2 is unknown" in service.messages()
    service.environment(BACKENDS="yes")
    assert eventually(service.answers)  # Restart= has started it again
    with service.connect() as client:
        assert client.ask("count").startswith("2 2 4 2")

    service.environment(PYTHONPATH=OLD)
    pid = service.pid
    service.signal("KILL")
    assert eventually(lambda: service.pid not in (0, pid) and service.answers())
    assert OLD == runs(service)
    with service.connect() as client:
        assert "" == client.ask("count")
    assert 1 == service.stored  # the listener
