# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader upgrade` in live mode under a real systemd: what it does, says, returns and leaves."""

import json
from collections.abc import Sequence
from typing import Any

from tests.support import eventually
from tests.system.reloading import installed
from tests.system.serving import Client, Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.takeover.__main__ import ENDED

#: Has an instance write down what it is asked: its generation, the PID of the caller, the method.
WATCH = """
from upgrader.instance import control_socket

answered = control_socket.answer

def heard(answers, library, caller, call):
    generation, method = answers.describe()["generation"], call.method.rpartition(".")[2]
    with open("/run/asked/calls", "a") as file:
        print(generation, caller.pid, method, file=file)
    return answered(answers, library, caller, call)

control_socket.answer = heard
"""


def running(service: Service, *more: str) -> Any:
    """`upgrader upgrade` under way, its standard error to be read."""
    command = ["upgrader", "upgrade", service.unit, *more]
    return service.machine.popen(command, stdout=-1, stderr=-1)


def test_it_is_live_where_it_can_be(any_machine: PrivateSystemd, install: Install) -> None:
    """Without a mode, and with nothing changed on disk: another process, connections and state
    kept, and the pause in the outcome."""
    service = installed(any_machine, install, "wanted")
    before = service.pid
    with service.clients(3) as clients:
        for client in clients:
            client.add()

        said = upgrade(service)

        assert ("done", "live", 0) == (said["result"], said["mode"], said["exit_code"])
        assert said["line"].startswith("wanted.service: upgraded in ")
        assert ("live", 1, 2) == (
            said["after"]["origin"],
            said["after"]["source_generation"],
            said["after"]["generation"],
        )
        assert 0 < said["pause_seconds"] < 1
        parts = ["asked", "takeover", "setup", "collecting", "frozen", "loading", "committed"]
        assert parts == list(said["times"])
        assert min(said["times"].values()) > 0
        assert sum(said["times"].values()) < said["seconds"]
        assert service.pid != before
        assert {(2, 2)} == {(count, seen) for count, _, seen in map(Client.add, clients)}


def test_a_bad_version_leaves_a_hold(any_machine: PrivateSystemd, install: Install) -> None:
    """The old instance serves on, the cause is the version's own, and the hold stays until a good
    version goes in; the status text says why, too."""
    service = installed(any_machine, install, "held")
    path = service.inside("/var/lib/upgrader/hold/held.service")
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        service.environment(MODE="refusing")

        said = upgrade(service)

        assert ("failed-old-serves", 1, True) == (said["result"], said["exit_code"], said["serves"])
        assert "not with me" in said["cause"]
        assert "not with me" in json.loads(path.read_bytes())["cause"]
        assert "not with me" in service.status.refused
        assert (2, 2, 1) == client.add()
        service.environment(MODE="exit")
        assert f"{ENDED}: this version ends at once" == upgrade(service)["cause"]
        service.environment(MODE="good")
        assert "done" == upgrade(service)["result"]
        assert not path.exists()
        assert (3, 3, 2) == client.add()
        assert "" == service.status.refused


def test_what_forbids_live_is_said(host_machine: PrivateSystemd, install: Install) -> None:
    """Without ExecReload= it is a restart, with a warning that says why; --mode live refuses."""
    service = install(host_machine, "plain", "holder")
    with service.connect() as client:
        client.add()

        refused = upgrade(service, "--mode", "live")
        said = upgrade(service)

        assert ("failed-old-serves", 1) == (refused["result"], refused["exit_code"])
        assert "ExecReload=" in refused["cause"]
        assert ("done", "restart") == (said["result"], said["mode"])
        assert any("ExecReload=" in warning for warning in said["warnings"])
        assert (2, 2, 2) == client.add()


def test_one_at_a_time(host_machine: PrivateSystemd, install: Install) -> None:
    """A second request is refused with who holds it and since when; with --wait it follows, and
    is told the same as the first."""
    service = installed(host_machine, install, "busy", "Environment=UPGRADER_DOWNTIME_LIMIT=15s")
    service.environment(MODE="slow", SLOW="/run/busy/go")
    with running(service) as first:
        _read_until(first.stderr, "systemd reloads it")
        assert eventually(service.inside("/run/busy/mark").exists)
        second = upgrade(service)
        with running(service, "--wait") as third:
            _read_until(third.stderr, "follows what is under way")
            service.inside("/run/busy/go").write_text("")
            told = [third.communicate(timeout=30)[0], first.communicate(timeout=30)[0]]
        codes = [third.returncode, first.returncode]

    assert ("busy", 75) == (second["result"], second["exit_code"])
    assert "a reload job" in second["cause"]
    assert "has been running for" in second["cause"]
    assert [0, 0] == codes
    assert 2 == service.status.generation
    assert all("generation 2, loaded by live from generation 1" in text for text in told)
    assert 2 == service.status.generation


def test_a_storm_is_one_or_two_upgrades(host_machine: PrivateSystemd, install: Install) -> None:
    """Ten requests at once: all of them end, and each is told the truth."""
    service = installed(host_machine, install, "storm")
    with service.connect() as client:
        client.add()
        storm = [running(service, "--json") for _ in range(10)]
        told = [json.loads(each.communicate(timeout=60)[0]) for each in storm]

        results = sorted({answer["result"] for answer in told})
        assert results in (["busy", "done"], ["done"]), told
        generation = service.status.generation
        assert generation in (2, 3)
        for answer in told:
            if answer["result"] == "done":
                assert 2 <= answer["after"]["generation"] <= generation
        assert (2, 2, generation) == client.add()


def _read_until(stream: Any, words: str) -> None:
    seen: Sequence[str] = []
    for line in stream:
        seen = [*seen, line]
        if words in line:
            return
    raise AssertionError(f"{words!r} was not said: {seen}")


def test_several_units_and_patterns(host_machine: PrivateSystemd, install: Install) -> None:
    """One after the other, the first failure ends it; a pattern stands for those that serve."""
    services = [installed(host_machine, install, f"many{number}") for number in (1, 2, 3)]
    services[1].environment(MODE="exit")

    done = host_machine.run(["upgrader", "upgrade", "many*", "--json"], check=False)
    told = json.loads(done.stdout)
    nobody = host_machine.run(["upgrader", "upgrade", "nobody@*"], check=False)
    everybody = host_machine.run(["upgrader", "upgrade", "*", "--dry-run", "--json"])
    foreign = host_machine.run(["upgrader", "upgrade", "dbus*"], check=False)

    assert 1 == done.returncode
    assert [("many1.service", "done"), ("many2.service", "failed-old-serves")] == [
        (each["unit"], each["result"]) for each in told
    ]
    assert [2, 1, 1] == [service.status.generation for service in services]
    assert {each.unit for each in services} <= {
        each["unit"] for each in json.loads(everybody.stdout) if each["result"] == "done"
    }
    assert (1, True) == (foreign.returncode, "dbus.service: not upgraded" in foreign.stderr)
    assert 4 == nobody.returncode
    assert "nobody@*: not upgraded: no service that runs matches this pattern" in nobody.stderr


def test_a_dry_run_does_nothing(host_machine: PrivateSystemd, install: Install) -> None:
    """It says what would be done, and who serves is the same."""
    service = installed(host_machine, install, "dry")
    before = service.pid

    said = upgrade(service, "--dry-run")

    assert "would be upgraded in mode live" in said["line"]
    assert (before, 1) == (service.pid, service.status.generation)


def test_phases_are_told(host_machine: PrivateSystemd, install: Install) -> None:
    """A person sees how far it has come, one line a phase."""
    service = installed(host_machine, install, "told")

    done = service.machine.run(["upgrader", "upgrade", service.unit])

    phases = [line.split()[1] for line in done.stderr.splitlines() if "(" in line]
    assert "committed" in phases, done.stderr


def test_a_cold_restart_drops_state_and_lifts_the_hold(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """The listener stays, connections and counters do not, and the image is set aside."""
    service = installed(any_machine, install, "chilly")
    with service.connect() as client:
        client.add()
        service.environment(MODE="refusing")
        assert "failed-old-serves" == upgrade(service)["result"]
        service.environment(MODE="good")

        done = service.machine.run(
            ["upgrader", "restart", "--cold", service.unit, "--json"], check=False
        )
        said = json.loads(done.stdout)

        assert (0, "done") == (done.returncode, said["result"]), said
        assert "set aside" in said["line"]
        assert "" == client.line()
    with service.connect() as client:
        assert (1, 1) == client.add()[:2]
    assert not service.inside("/var/lib/upgrader/hold/chilly.service").exists()


def test_a_hold_is_lifted_by_hand(host_machine: PrivateSystemd, install: Install) -> None:
    """`upgrader unhold`, and once more is no error."""
    service = installed(host_machine, install, "lifted")
    service.environment(MODE="exit")
    assert "failed-old-serves" == upgrade(service)["result"]

    first = service.machine.run(["upgrader", "unhold", service.unit]).stdout
    second = service.machine.run(["upgrader", "unhold", service.unit]).stdout

    assert "the hold is lifted" in first
    assert "there is no hold on it" in second


def test_each_instance_is_asked_once(host_machine: PrivateSystemd, install: Install) -> None:
    """The tool asks the running instance once what it is, and the new one once how it came to be;
    takeover asks once as well, and nobody asks anything besides."""
    host_machine.write("/opt/asked/sitecustomize.py", WATCH)
    service = installed(host_machine, install, "asked", "Environment=PYTHONPATH=/opt/asked")
    calls = service.inside("/run/asked/calls")
    for mode, describes, others in (
        ("live", 3, ["Expect", "Migrate", "Register"]),
        ("restart", 2, ["Settle", "TryStates"]),
        ("exec", 2, ["Execute"]),
    ):
        calls.unlink(missing_ok=True)

        assert "done" == upgrade(service, "--mode", mode)["result"]

        asked = calls.read_text().splitlines()
        assert others == sorted(line.split()[2] for line in asked if "Describe" not in line)
        assert (
            describes == sum("Describe" in line for line in asked) == len(set(asked)) - len(others)
        )
