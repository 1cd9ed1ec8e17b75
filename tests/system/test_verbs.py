# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every verb of the command line against real units: what it does, says and returns."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support import eventually
from tests.system.reloading import live, paused, reload, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import NOBODY, NOWHERE, described, found, status, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def service(any_machine: PrivateSystemd, install: Install) -> Service:
    """A service that can be upgraded live, and is asked about."""
    drains = "Environment=DRAINS=1"
    made = install(any_machine, "asked", "holder", *live(any_machine, "asked"), drains)
    assert socket_there(made)
    return made


# Status and list


def test_status_tells_what_runs_and_what_it_holds(service: Service) -> None:
    """Version, generation, backends with FD and address, connections, parameters, no hold."""
    with service.connect() as client:
        client.add()
        done = upgrader(service.machine, "status", service.name)
        seen = status(service)

    assert (0, "") == (done.returncode, done.stderr)
    assert f"{service.unit}: serving since " in done.stdout
    assert "generation 1, cold start" in done.stdout
    assert "version 2, process" in done.stdout
    assert "the same version: no file of the program has changed" in done.stdout
    assert "hold: none" in done.stdout
    assert f"127.0.0.1:{service.port}" in done.stdout
    instance = seen["instance"]
    assert (service.pid, "serving", True) == (instance["pid"], instance["phase"], seen["serves"])
    (door,) = instance["backends"]
    assert ("door", "listener", 1, 0) == tuple(
        door[name] for name in ("name", "kind", "connections", "busy")
    )
    assert "300ms" == instance["parameters"]["downtime-limit"]
    assert {"counters": 2} == instance["states"]


def test_status_names_what_holds_a_drain(service: Service) -> None:
    """After a live upgrade, the old instance is listed with the connection that it waits for, until
    it has ended; a socket of one that was killed is not."""
    dead = f"/run/{service.name}/draining-99.sock"
    bind = f"import socket; socket.socket(socket.AF_UNIX).bind({dead!r})"
    service.machine.run([*service.machine.python, "-c", bind])
    with service.clients(2) as (idle, busy):
        assert {(1, 1)} == {(each.add()[0], each.add()[2]) for each in (idle, busy)}
        upgrader(service.machine, "set", service.unit, "live-drain-timeout=1min")
        busy.send(f"until /run/{service.name}/go\n")
        assert eventually(lambda: described(service)["backends"][0].get("busy") == 1)
        old = service.pid
        service.environment(ROUND="2")

        assert reload(service), service.messages()

        assert socket_there(service)
        seen = status(service)
        (draining,) = seen["draining"]
        assert (1, old, "draining", 1) == tuple(
            draining[name] for name in ("generation", "pid", "phase", "connections")
        )
        (held,) = draining["held"]
        assert ("door", "", f"127.0.0.1:{busy.sock.getsockname()[1]}") == (
            held["backend"], held["waiting"], held["peer"],
        )  # fmt: skip
        shown = upgrader(service.machine, "status", service.unit).stdout
        assert f"generation 1 (process {old}) is draining: 1 open" in shown
        assert idle.add()[2] == 2
        last = seen["instance"]["migration"]
        assert ("done", "live", 1, 2, 1) == tuple(
            last[name] for name in ("phase", "mode", "source", "destination", "left_behind")
        )
        service.inside(f"/run/{service.name}/go").touch()
        assert "done" == busy.line()
        assert eventually(lambda: status(service)["draining"] == [])
        assert not service.inside(f"/run/{service.name}/draining-1.sock").exists()


def test_list_tells_one_line_for_each_unit(service: Service) -> None:
    """`upgrader` alone is `upgrader list`; a changed program shows, units without it do not."""
    service.machine.run(["touch", "/opt/upgrader-tests/holder.py"])
    listed = upgrader(service.machine)
    rows = {line.split()[0]: line for line in listed.stdout.splitlines()}

    assert listed.returncode == 0
    assert "changed" in rows[service.unit].split()
    assert not any("dbus" in name for name in rows)
    units = json.loads(upgrader(service.machine, "list", "--json").stdout)
    (mine,) = [each for each in units if each["unit"] == service.unit]
    assert ["/opt/upgrader-tests/holder.py"] == mine["instance"]["changed"]


def test_watch_shows_phases_as_they_happen(any_machine: PrivateSystemd, install: Install) -> None:
    """Of one upgrade after the other, whoever asks for it, each phase once; Ctrl-C ends it."""
    service = install(any_machine, "watched", "lively", *live(any_machine, "watched"))
    command = ["upgrader", "status", "--watch", "--json", service.unit]
    with service.machine.popen(command, stdout=subprocess.PIPE) as watching:
        seen = []

        def read_until(generation: int, phase: str) -> None:
            while not seen or (seen[-1]["source"], seen[-1]["phase"]) != (generation, phase):
                assert watching.stdout is not None
                seen.append(json.loads(watching.stdout.readline()))

        for generation in (1, 2):
            assert eventually(lambda n=generation: described(service)["generation"] == n)
            # Nobody knows when it begins to watch this instance: an upgrade is there until it does.
            with paused(service, "import", ROUND=str(generation)) as upgrade:
                read_until(generation, "setup")
                upgrade.go()
                assert upgrade.wait(), service.messages()
            read_until(generation, "done")
        service.machine.run(["pkill", "-INT", "-f", "upgrader status --watch"])
        assert watching.stdout is not None
        assert "" == watching.stdout.read()
    phases = ["setup", "collecting", "frozen", "loading", "committed", "done"]
    assert [(n, each) for n in (1, 2) for each in phases] == [
        (each["source"], each["phase"]) for each in seen
    ]
    assert 130 == watching.returncode


def test_n6_watch_ends_with_its_reader(service: Service) -> None:
    """As in `status --watch | head -1`."""
    pipe = ["sh", "-c", f"upgrader status --watch {service.unit} | head -n 1"]

    assert f"{service.unit}: serving" in service.machine.run(pipe).stdout


def test_metrics_for_prometheus(service: Service) -> None:
    """Of all units or of one, every sample with its unit; what is known in numbers."""
    service.environment(ROUND="2")
    assert reload(service), service.messages()
    assert socket_there(service)
    done = upgrader(service.machine, "status", "--prometheus")
    samples = [line for line in done.stdout.splitlines() if line[0] != "#"]
    own = {line.partition("{")[0]: line for line in samples if service.unit in line}

    assert 0 == done.returncode, done.stderr
    assert all(re.fullmatch(r'upgrader_\w+\{unit="[^"]+"(,\w+="[^"]*")*\} [-+.e\d]+', line)
               for line in samples)  # fmt: skip
    assert own["upgrader_serving"].endswith(" 1")
    assert own["upgrader_generation"].endswith(" 2")
    assert own["upgrader_held"].endswith(" 0")
    assert 'mode="live"} 1' in own["upgrader_last_upgrade_success"]
    assert 'version="2"' in own["upgrader_info"]
    one = upgrader(service.machine, "status", service.unit, "--prometheus").stdout
    assert sorted(line for line in samples if service.unit in line) == sorted(
        line for line in one.splitlines() if line[0] != "#"
    )


# Every verb, when it cannot


@pytest.fixture
def foreign(any_machine: PrivateSystemd) -> Iterator[str]:
    """A unit that does not use the library."""
    any_machine.run(["systemd-run", "--unit=foreign", "sleep", "infinity"])
    yield "foreign"
    any_machine.run(["systemctl", "stop", "foreign"])


VERBS = [["status"], ["check"], ["history"], ["dump"], ["set", "drain-timeout=5s"], ["cancel"]]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_verb_that_cannot(service: Service, foreign: str, verb: list[str]) -> None:
    """A mistyped unit and an unreachable systemd are 4, a foreign unit is 1; no traceback, and
    --json is one object all the same."""
    machine = service.machine
    command, *rest = verb
    mistyped = upgrader(machine, command, "aksed", *rest)
    asked = [*NOBODY, "upgrader", command, "asked", *rest]  # root has a way without the bus
    unreachable = machine.run(asked, env=NOWHERE, check=False)
    other = upgrader(machine, command, foreign, *rest)

    assert (4, True) == (mistyped.returncode, "did you mean asked.service" in mistyped.stderr)
    assert (4, True) == (unreachable.returncode, "systemd cannot be reached" in unreachable.stderr)
    assert 1 == other.returncode, other
    assert "does not use upgrader" in other.stdout + other.stderr
    told = upgrader(machine, command, "aksed", *rest, "--json")
    assert 4 == json.loads(told.stdout)["exit_code"] == told.returncode
    for done in (mistyped, unreachable, other, told):
        assert "Traceback" not in done.stderr


def test_status_without_permission(service: Service) -> None:
    """What everybody may know is told to everybody, and that it is not all; if the socket is not
    theirs, what PID 1 says, and why there is no more."""
    done = upgrader(service.machine, "status", service.unit)
    asked = service.machine.run([*NOBODY, "upgrader", "status", service.unit], check=False)

    assert (0, 0) == (done.returncode, asked.returncode), asked.stderr
    assert "root is told more" in asked.stdout
    assert "generation 1, cold start" in asked.stdout
    service.inside(f"/run/{service.name}/status.sock").chmod(0o600)
    asked = service.machine.run([*NOBODY, "upgrader", "status", service.unit], check=False)
    assert "may only be asked by root" in asked.stdout
    assert "generation 1, cold start" in asked.stdout
    listed = service.machine.run([*NOBODY, "upgrader"], check=False)
    assert (0, True) == (listed.returncode, "upgrader status UNIT says why" in listed.stderr)
    assert any(
        line.split()[:4] == [service.unit, "serving", "?", "?"]
        for line in listed.stdout.splitlines()
    )


@pytest.mark.parametrize("verb", [*VERBS[4:], ["upgrade", "--preflight"]], ids=lambda verb: verb[0])
def test_steering_without_permission(service: Service, verb: list[str]) -> None:
    """It is 77, says so, and changes nothing."""
    command, *rest = verb
    before = status(service)["instance"]["parameters"]
    asked = [*NOBODY, "upgrader", command, service.unit, *rest]
    done = service.machine.run(asked, check=False)

    assert (77, "") == (done.returncode, done.stdout)
    assert "root" in done.stderr
    assert before == status(service)["instance"]["parameters"]


def test_set_refuses_what_makes_no_sense(service: Service) -> None:
    """It is 2, names the parameter and what there is, and sets none of them."""
    before = status(service)["instance"]["parameters"]
    for wrong in ("drian-timeout=5s", "drain-timeout=soon", "backend-transfer.dor=no"):
        done = upgrader(service.machine, "set", service.unit, "insurance=9s", wrong)
        assert 2 == done.returncode
        assert wrong.partition("=")[0] in done.stderr
    assert 2 == upgrader(service.machine, "set", service.unit, "drain-timeout").returncode
    assert before == status(service)["instance"]["parameters"]


# Check


def test_check_finds_nothing_where_all_is_well(service: Service) -> None:
    """It is 0, one line, and nothing is touched; 252 is told what it cannot do."""
    before = service.show("InvocationID", "NeedDaemonReload", "DropInPaths", "StatusText")
    done = upgrader(service.machine, "check", service.unit)

    assert (0, "") == (done.returncode, done.stderr), done.stdout
    first, *warnings = done.stdout.splitlines()
    assert first.startswith(f"{service.unit}: can be upgraded live")
    if service.machine.systemd_version >= 254:
        assert [] == warnings
    else:
        assert "systemd 252 is older than 254" in warnings[0]
    assert before == service.show("InvocationID", "NeedDaemonReload", "DropInPaths", "StatusText")


def test_check_finds_what_surprises(trixie_machine: PrivateSystemd, install: Install) -> None:
    """Sockets that were not declared, forked processes that an upgrade ends, late modules, skipped
    directives, too little room, a unit file that was not read: each named, with a remedy."""
    more = [*live(trixie_machine, "careless"), "ExecStartPre=true", "TasksMax=5",
            "Environment=UPGRADER_DRAIN_TIMEOUT=60s"]  # fmt: skip
    service = install(trixie_machine, "careless", "careless", *more)
    assert socket_there(service)
    service.machine.run(["touch", f"/etc/systemd/system/{service.unit}"])
    with service.connect() as client:
        assert "done" == client.ask("be careless")
    report = found(service)
    said = {each["what"]: each for each in report["findings"]}

    assert ("live", 0) == (report["mode"], report["exit_code"])
    for part in (
        f"it listens on TCP 127.0.0.1:{service.port + 1000} and has not declared",
        f"it listens on UDP [::1]:{service.port - 6500} and has not declared",
        "it listens on UNIX /run/careless/other.sock and has not declared",
        "an upgrade ends what the instance has started, by SIGTERM",
        "modules were imported after it was ready: colorsys",
        "ExecStartPre= is not run by a live upgrade",
        "TasksMax=5 leaves no room",
        "its unit file has changed on disk",
        "drain-timeout=1min is not below TimeoutStopSec=20s",
    ):
        (one,) = [text for text in said if part in text] or [""]
        assert one, (part, list(said))
        assert said[one]["remedy"]
    assert len([text for text in said if "it listens on" in text]) == 3


def test_check_fix_writes_what_is_missing(trixie_machine: PrivateSystemd, install: Install) -> None:
    """A unit that cannot be upgraded live is told why; the drop-in is shown, written and read, and
    after a restart the unit can; a second run has nothing to do."""
    wrong = ["NotifyAccess=main", "KillMode=mixed", "ExecReload=true", "OOMPolicy=kill"]
    service = install(trixie_machine, "unfit", "holder", *wrong)
    report = found(service)
    assert ("restart", 1) == (report["mode"], report["exit_code"])
    assert {"restart-only", "warning"} >= {each["severity"] for each in report["findings"]}
    before = service.show("InvocationID")

    done = upgrader(trixie_machine, "check", service.unit, "--fix")

    path = f"/etc/systemd/system/{service.unit}.d/50-upgrader.conf"
    try:
        assert before == service.show("InvocationID")
        assert path in done.stderr
        for line in ("KillMode=control-group", "NotifyAccess=exec", "RuntimeDirectory=unfit"):
            assert line in done.stderr
            assert line in service.inside(path).read_text().splitlines()
        service.restart()
        assert socket_there(service)
        assert ("live", []) == (found(service)["mode"], found(service)["findings"])
        again = upgrader(trixie_machine, "check", service.unit, "--fix")
        assert (0, "") == (again.returncode, again.stderr)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
    finally:
        trixie_machine.run(["rm", "-r", f"/etc/systemd/system/{service.unit}.d"])


def test_check_fix_without_permission(service: Service) -> None:
    """It is 77, and nothing is written; without --fix, what can be seen is said."""
    service.configure(*live(service.machine, "asked"), "KillMode=process")
    for arguments, code in (["--fix"], 77), ([], 1):
        asked = [*NOBODY, "upgrader", "check", service.unit, *arguments]
        done = service.machine.run(asked, check=False)
        assert code == done.returncode, done
        assert "as root" in done.stderr + done.stdout
    assert not service.inside(f"/etc/systemd/system/{service.unit}.d").exists()


# History


def test_history_is_what_the_journal_has(service: Service) -> None:
    """A live upgrade, a failed one and a restart: one line for what each side said, with times and
    pauses; the same as objects, and as a picture whose labels can be read."""
    service.environment(ROUND="2")
    assert reload(service), service.messages()
    assert socket_there(service)
    service.environment(MODE="refusing")
    assert not reload(service)
    service.environment(ROUND="3")
    service.restart()
    done = upgrader(service.machine, "history", service.unit, "-n", "9")
    events = json.loads(upgrader(service.machine, "history", service.unit, "--json").stdout)
    picture = upgrader(service.machine, "history", service.unit, "--svg").stdout

    assert (0, "") == (done.returncode, done.stderr)
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["TIME", "KIND", "GENERATION"]
    assert any(" live " in row and " 1 -> 2 " in row.replace("\u2192", "->") for row in rows)
    assert any("not with me" in row and " failed " in row for row in rows)
    (live_one,) = [e for e in events[-9:] if (e["side"], e["phase"], e["outcome"], e["source"]) ==
                   ("source", "migrate", "done", 1)]  # fmt: skip
    assert 0 < live_one["pause"] < live_one["seconds"]
    assert {"setup", "collecting", "frozen", "loading", "committed"} == live_one["times"].keys()
    assert abs(sum(live_one["times"].values()) - live_one["seconds"]) < 0.05
    (loaded,) = [e for e in events[-9:] if e["side"] == "destination" and e["source"] == 1]
    assert (loaded["pause"], loaded["id"]) == (live_one["pause"], live_one["id"])
    (restarted,) = [e for e in events[-9:] if e["mode"] == "restart"]
    assert ("destination", 2, 3) == tuple(restarted[n] for n in ("side", "source", "destination"))
    labels = [text.text or "" for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert f"Upgrades of {service.unit}" in labels
    for part in ("live 1 \u2192 2", "restart 2 \u2192 3", "failed: ", "frozen", "paused "):
        assert any(part in label for label in labels), (part, labels)
    (entry,) = service.journal("UPGRADER_MODE=restart")
    assert int(entry["UPGRADER_PAUSE_USEC"]) == round(restarted["pause"] * 1e6)


# Dump


@pytest.mark.parametrize(("mechanism", "kind"), [("scm-rights", "channel"), ("fd-store", "image")])
def test_dump_looks_at_a_parked_image(
    trixie_machine: PrivateSystemd, install: Install, mechanism: str, kind: str
) -> None:
    """By channel, and one by one: names, versions and sizes; the next start loads it all the same."""
    parameter = f"Environment=UPGRADER_BACKEND_TRANSFER_MECHANISM={mechanism}"
    more = [*live(trixie_machine, "dumped"), "RestartSec=1h", parameter]
    service = install(trixie_machine, "dumped", "holder", *more)
    with service.clients(2) as clients:
        assert [1, 2] == [client.add()[1] for client in clients]
        service.environment(MODE="exit")
        service.restart(check=False)
        for _ in range(2):
            done = upgrader(trixie_machine, "dump", service.unit)
            assert (0, "") == (done.returncode, done.stderr)
        words = done.stdout.split()
        assert f"upgrader-{kind}-1: generation 1 of holder (version 2)" in done.stdout
        assert ["counters", "2", "2"] == words[words.index("counters") :][:3]
        (one,) = json.loads(upgrader(trixie_machine, "dump", "dumped", "--json").stdout)
        assert {("listener", 1), ("connection", 2)} == {
            (each["kind"], each["count"]) for each in one["entries"]
        }
        service.environment()
        service.restart()
        assert {(2, 2)} == {(count, seen) for count, _, seen in (c.add() for c in clients)}


def test_dump_of_a_file(any_machine: PrivateSystemd) -> None:
    """The image of a file; of one that is none, what is wrong with it: 2, and no traceback."""
    golden = Path(__file__).parents[1] / "unit" / "streams" / "v1-image.bin"
    any_machine.copy_in(golden, "/run/image.bin")
    done = upgrader(any_machine, "dump", "/run/image.bin")
    assert (0, True) == (done.returncode, "/run/image.bin: generation" in done.stdout), done
    for path, why in (("/etc/hostname", "truncated: "), ("/nowhere", "No such file")):
        done = upgrader(any_machine, "dump", path)
        assert (2, True) == (done.returncode, why in done.stderr), done
        assert "Traceback" not in done.stderr


# For the shell


def test_units_and_parameters_are_completed(service: Service) -> None:
    """By the shell's own means; silence where systemd cannot be asked."""

    def completed(words: str, *before: str, **env: str) -> list[str]:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), **env}
        asked["_UPGRADER_COMPLETE"] = "bash_complete"
        done = service.machine.run([*before, "upgrader"], env=asked)
        assert "" == done.stderr
        return [line.partition(",")[2] for line in done.stdout.split()]

    assert [service.unit] == completed("upgrader status aske")
    assert [service.unit] == completed("upgrader upgrade aske")
    assert ["drain-timeout="] == completed("upgrader set asked dr")
    assert [] == completed("upgrader status aske", *NOBODY, **NOWHERE)
