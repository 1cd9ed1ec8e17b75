# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader upgrade` and `discard` under a real systemd: what they do, say and return."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.serving import Client, Install, Service
from tests.system.tool import NOBODY, NOWHERE, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

#: A start limit that upgrades must not run into; systemd tries again after the test has looked.
SETTINGS = ("[Unit]", "StartLimitIntervalSec=10s", "[Service]", "RestartSec=60s")
HASTY = "TimeoutStartSec=2s"


@pytest.fixture
def service(any_machine: PrivateSystemd, install: Install) -> Iterator[Service]:
    """A service that keeps the library's contract and fails as told, started."""
    made = install(any_machine, "upgraded", "contract", *SETTINGS)
    yield made
    _kill(made)


@pytest.fixture
def counter(any_machine: PrivateSystemd) -> Iterator[Service]:
    """A service with the real library; not started."""
    made = Service(any_machine, "counting", "counter", SETTINGS)
    yield made
    _kill(made)
    made.remove()


def _kill(service: Service) -> None:
    """One that does not end by itself would keep the test waiting."""
    service.machine.run(["systemctl", "kill", "-s", "KILL", service.unit], check=False)


def put(service: Service, version: str) -> None:
    """What the next start runs."""
    service.environment(VERSION=version)


def change(service: Service, *lines: str) -> None:
    """Change the unit file; PID 1 is not told."""
    service.write(*SETTINGS, *lines)


def shown(service: Service, name: str) -> str:
    """One property of the unit."""
    return service.show(name)[0]


def now(service: Service) -> list[str]:
    """What an upgrade changes, and a refused one must not."""
    return service.show(
        *("InvocationID", "ActiveState", "StatusText", "NFileDescriptorStore"),
        *("Job", "DropInPaths", "NRestarts"),
    )


def upgrade(service: Service, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`upgrader upgrade` of the service."""
    return upgrader(service.machine, "upgrade", "--quiet", service.unit, *arguments)


# Done


def test_success_is_one_line(service: Service) -> None:
    """An upgrade that is done prints one line, ends with 0, and another instance serves."""
    before = shown(service, "InvocationID")
    done = upgrader(service.machine, "upgrade", service.name)

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{service.unit}: upgraded in ")
    assert "generation 2, loaded by restart from generation 1" in line
    assert "the new instance starts" in done.stderr
    assert shown(service, "InvocationID") != before


def test_json_tells_before_and_after(service: Service) -> None:
    """With --json, one object tells the outcome, both instances and the pause."""
    done = upgrade(service, "--json")
    shown = json.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert (shown["result"], shown["serves"], shown["exit_code"]) == ("done", True, 0)
    assert shown["before"]["generation"] == shown["after"]["source_generation"] == 1
    assert 0 < shown["pause_seconds"] < shown["seconds"]
    assert shown["systemd"].startswith(str(service.machine.systemd_version))


def test_a_changed_unit_file_is_reloaded_first(service: Service) -> None:
    """The new instance runs with the unit file that is on disk now."""
    change(service, "Environment=NEW=1")
    done = upgrader(service.machine, "upgrade", service.unit)

    assert done.returncode == 0, done.stderr
    assert "daemon-reload" in done.stderr
    assert "NEW=1" in shown(service, "Environment").split()


def test_an_alias_is_resolved(service: Service) -> None:
    """A unit may be named by an alias; the line names the unit."""
    alias = f"/run/systemd/system/also-{service.unit}"
    service.machine.run(["ln", "-sf", service.unit, alias])
    service.machine.run(["systemctl", "daemon-reload"])
    done = upgrader(service.machine, "upgrade", f"also-{service.name}")
    service.machine.run(["rm", alias])

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{service.unit}: upgraded")


def test_many_upgrades_in_a_row(service: Service) -> None:
    """Upgrades never run into StartLimitBurst=, which would stop a service that serves."""
    for _ in range(7):
        done = upgrade(service)
        assert done.returncode == 0, done.stderr

    assert shown(service, "StatusText").startswith("generation 8,")


def test_the_limit_of_252_is_told(service: Service) -> None:
    """Where a failed start could lose the image, a warning says so; elsewhere there is none."""
    done = upgrader(service.machine, "upgrade", service.unit)

    old = service.machine.systemd_version < 254
    assert ("warning: after a failed start the image is kept only while" in done.stderr) == old
    change(service, "FileDescriptorStorePreserve=restart", "Restart=no")
    done = upgrader(service.machine, "upgrade", service.unit)
    assert done.returncode == 0, done.stderr
    assert "warning: a new version that does not start loses the image at once" in done.stderr


def test_two_at_once(service: Service) -> None:
    """Of two upgrades at the same time each is done or refused as busy, and the service serves."""
    command = ["upgrader", "upgrade", "--quiet", service.unit]
    running = [service.machine.popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    said = [each.communicate(timeout=60)[1] for each in running]
    codes = sorted(each.returncode for each in running)

    assert codes in ([0, 0], [0, 75]), said
    assert "loaded by restart" in shown(service, "StatusText")


def test_waiting_for_ever(service: Service) -> None:
    """`--timeout infinity` is understood, as systemd writes it."""
    assert upgrade(service, "--timeout", "infinity").returncode == 0


# Refused: nothing is changed


def test_a_mistyped_unit(service: Service) -> None:
    """A unit that does not exist is 4, and one that looks like it is offered."""
    done = upgrader(service.machine, "upgrade", service.name.replace("upgraded", "upgarded"))

    assert done.returncode == 4
    assert "there is no such unit" in done.stderr
    assert "did you mean upgraded" in done.stderr


def test_a_unit_that_does_not_use_the_library(any_machine: PrivateSystemd) -> None:
    """A foreign unit is left alone: 1, for it serves."""
    show = ["systemctl", "show", "-p", "InvocationID,ActiveState,NRestarts", "dbus.service"]
    before = any_machine.run(show).stdout
    done = upgrader(any_machine, "upgrade", "--quiet", "dbus")

    assert done.returncode == 1
    assert "it serves as before: it does not use upgrader" in done.stderr
    assert any_machine.run(show).stdout == before


def test_without_permission(service: Service) -> None:
    """A user who may do nothing is told so, also that it would be a restart: 77, and nothing is
    changed."""
    before = now(service)
    asked = [*NOBODY, "upgrader", "upgrade", "--quiet", service.unit]
    done, named = (
        service.machine.run([*asked, *more], check=False) for more in ((), ("--mode", "restart"))
    )
    # Asking without permission starts it, where there is one.
    service.machine.run(["systemctl", "stop", "polkit.service"], check=False)

    assert (77, 77) == (done.returncode, named.returncode), (done.stderr, named.stderr)
    assert "it would be a restart" in done.stderr
    assert "as root" in named.stderr
    assert now(service) == before


def test_without_a_bus(service: Service) -> None:
    """Without a bus it is 4 for who is not root, and the remedy says where to look."""
    before = now(service)
    asked = [*NOBODY, "upgrader", "upgrade", service.unit]
    done = service.machine.run(asked, env=NOWHERE, check=False)

    assert done.returncode == 4
    assert "systemd cannot be reached over D-Bus: No such file or directory" in done.stderr
    assert "systemctl status dbus.socket" in done.stderr
    assert now(service) == before


@pytest.mark.parametrize(
    ("setting", "value"), [("FileDescriptorStoreMax", "0"), ("Type", "simple")]
)
def test_a_setting_that_would_lose_the_image(service: Service, setting: str, value: str) -> None:
    """A unit file that defeats the upgrade is refused, the setting named, nothing restarted."""
    change(service, f"{setting}={value}")
    before = shown(service, "InvocationID")
    done = upgrade(service)

    assert done.returncode == 1
    assert f"{setting}={value} in the unit" in done.stderr
    assert f"systemctl edit {service.unit}" in done.stderr
    assert shown(service, "InvocationID") == before


def test_while_another_job_is_in_flight(service: Service) -> None:
    """A job in the way is 75, named, and not replaced; the same for discard."""
    put(service, "hang")
    service.machine.run(["systemctl", "restart", "--no-block", service.unit])
    assert eventually(lambda: shown(service, "SubState") == "start")
    before = now(service)

    for verb in ("upgrade", "discard"):
        done = upgrader(service.machine, verb, service.unit)
        assert done.returncode == 75, done.stderr
        assert "busy: a start job (id " in done.stderr
    assert now(service) == before


def test_a_unit_that_does_not_run(service: Service) -> None:
    """A stopped unit is 3, and how to start it is said."""
    service.machine.run(["systemctl", "stop", service.unit])
    service.machine.run(["systemctl", "reset-failed"])
    done = upgrade(service)

    assert done.returncode == 3
    assert "NOT SERVING: it is not running (inactive)" in done.stderr
    assert f"systemctl start {service.unit}" in done.stderr
    assert shown(service, "ActiveState") == "inactive"


# Failed: the new version does not start


@pytest.mark.parametrize(
    ("version", "cause"),
    [
        ("exit", "exited with status 1: ModuleNotFoundError: No module named 'missing'"),
        ("kill", "the new instance was killed by SIGKILL"),
        ("hang", "not ready within TimeoutStartSec=2s"),
        ("unreadable", "state 'counters': saved as version 2, readable from version 2 on"),
    ],
)
def test_a_version_that_does_not_start(service: Service, version: str, cause: str) -> None:
    """It is 3, the cause is named, and so is that systemd tries again; with the good version back
    everything is loaded."""
    put(service, version)
    change(service, HASTY)
    done = upgrade(service)

    assert done.returncode == 3
    assert done.stdout == ""
    line, *remedy = done.stderr.splitlines()
    assert line.startswith(f"{service.unit}: not upgraded, NOT SERVING, systemd tries again: ")
    assert cause in line
    assert any("is kept" in each for each in remedy)
    assert f"; whether it serves by now: upgrader status {service.unit}" in remedy[0]
    assert f"  to try at once: systemctl restart {service.unit}" in remedy
    put(service, "good")
    service.machine.run(["systemctl", "restart", service.unit])
    assert "generation 2, loaded by restart from generation 1" in shown(service, "StatusText")


def test_a_program_that_is_not_there(service: Service) -> None:
    """systemd's own words are the cause where the program could not even be run."""
    change(service, "ExecStart=", "ExecStart=/srv/is-not-there")
    done = upgrade(service)

    assert done.returncode == 3
    assert "/srv/is-not-there" in done.stderr
    assert "No such file" in done.stderr


def test_what_is_lost_is_said_to_be_lost(service: Service) -> None:
    """Where PID 1 has closed the store, nobody is told that the image is kept."""
    change(service, "FileDescriptorStorePreserve=restart", "Restart=no")
    put(service, "exit")
    done = upgrade(service)

    assert done.returncode == 3
    assert "NOT SERVING: " in done.stderr
    assert "the image is lost" in done.stderr


@pytest.mark.parametrize(
    ("version", "cause"),
    [
        ("cold", "the new instance found no image"),
        ("aside", "the image of generation 1 could not be loaded"),
        ("plain", "the new instance does not use upgrader"),
    ],
)
def test_starting_without_the_image_is_no_success(
    service: Service, version: str, cause: str
) -> None:
    """An instance that is ready but has loaded nothing is 1: it serves, and state is missing."""
    put(service, version)
    done = upgrade(service)

    assert done.returncode == 1
    assert f"serving, but started without the image: {cause}" in done.stderr


def test_a_stray_ready_is_no_success(service: Service) -> None:
    """A program that says READY=1 itself and fails a little later does not serve: 3, a hold is left,
    and what was kept is loaded by the next good version."""
    put(service, "stray")
    done = upgrade(service)

    assert done.returncode == 3, done.stderr
    assert "NOT SERVING" in done.stderr
    assert "this version fails a little later" in done.stderr
    assert service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()
    put(service, "good")
    service.restart()
    assert "generation 2, loaded by restart from generation 1" in shown(service, "StatusText")


def test_an_old_instance_that_does_not_stop(service: Service) -> None:
    """The cause is that the old instance was killed before it parked, not the cold start."""
    put(service, "stuck")
    change(service, "TimeoutStopSec=1s")
    assert upgrade(service).returncode == 0
    put(service, "good")
    done = upgrade(service)

    assert done.returncode == 1
    assert "the old instance did not stop within TimeoutStopSec=1s" in done.stderr


def test_a_timeout_of_the_caller(service: Service) -> None:
    """When --timeout is over it is 3, and systemd's job goes on."""
    put(service, "hang")
    done = upgrade(service, "--timeout", "200ms")

    assert done.returncode == 3
    assert "not ready after 200ms (--timeout)" in done.stderr
    assert shown(service, "Job") not in ("", "0")


# Discard


def unreadable(service: Service) -> None:
    """Bring the service where only a discard, or a good version, helps."""
    put(service, "unreadable")
    assert upgrade(service).returncode == 3


def assert_no_trace(service: Service) -> None:
    """Nothing temporary is left of a discard."""
    assert shown(service, "DropInPaths") == ""
    assert shown(service, "NeedDaemonReload") == "no"
    assert "UPGRADER_DISCARD" not in shown(service, "Environment")
    path = f"/run/systemd/system/{service.unit}.d"
    assert service.machine.run(["test", "-e", path], check=False).returncode == 1


def test_discard_starts_without_the_image(service: Service) -> None:
    """The service starts cold, the image is set aside, and no drop-in stays."""
    unreadable(service)
    done = upgrader(service.machine, "discard", service.unit)

    assert done.returncode == 0, done.stderr
    assert f"{service.unit}: started without the image" in done.stdout
    assert "cold start, image of generation 1 set aside" in shown(service, "StatusText")
    assert_no_trace(service)
    assert upgrade(service).returncode == 0, "the next image is parked and loaded as ever"


def test_discard_of_a_unit_that_serves(service: Service) -> None:
    """Nothing is parked while an instance serves: said, and nothing is done."""
    before = now(service)
    done = upgrader(service.machine, "discard", service.unit)

    assert done.returncode == 0
    assert "no image is parked, nothing to discard" in done.stdout
    assert now(service) == before


def test_discard_without_an_image(service: Service) -> None:
    """A stopped unit with an empty store has nothing to discard: 3, for it does not serve."""
    service.machine.run(["systemctl", "kill", "-s", "KILL", service.unit])
    assert eventually(lambda: shown(service, "SubState") == "auto-restart")
    done = upgrader(service.machine, "discard", service.unit)

    assert done.returncode == 3
    assert "no image is parked for it" in done.stderr


@pytest.mark.parametrize(("signal", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_an_interrupted_discard_leaves_nothing(service: Service, signal: str, code: int) -> None:
    """Ctrl-C, SIGTERM and a lost terminal remove the drop-in, too."""
    unreadable(service)
    put(service, "hang")
    with service.machine.popen(
        ["upgrader", "discard", service.unit],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stderr is not None
        assert "systemd starts it without the image" in running.stderr.readline()
        service.machine.run(["pkill", f"-{signal}", "-f", f"upgrader discard {service.unit}"])
        running.communicate(timeout=30)

    assert running.returncode == code
    assert_no_trace(service)


# With the real library


def count(client: Client) -> int:
    """Send a line, get its number."""
    return int(client.ask("line"))


def test_a_connection_lives_through_upgrades_good_and_bad(counter: Service) -> None:
    """Bad versions, and each time the good one after: the connection and the count are there."""
    put(counter, "2")
    counter.start()
    with counter.connect() as client:
        assert count(client) == 1
        put(counter, "1")
        refused = upgrade(counter)

        assert refused.returncode == 3
        assert "state 'counter'" in refused.stderr
        assert "this program has version 1" in refused.stderr
        put(counter, "2")
        counter.restart()
        assert count(client) == 2
        for version, cause in (
            ("exit", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("hang", "not ready within TimeoutStartSec=2s"),
        ):
            put(counter, version)
            counter.configure(*SETTINGS, *([HASTY] if version == "hang" else []))
            failed = upgrade(counter)
            assert failed.returncode == 3
            assert cause in failed.stderr
            put(counter, "2")
            counter.configure(*SETTINGS)
            counter.restart()
            assert count(client) > 2
        done = upgrade(counter)
        assert done.returncode == 0, done.stderr
        assert "2 FDs" in done.stdout
        assert count(client) == 5


def test_after_the_start_limit(counter: Service) -> None:
    """When PID 1 has given up, a start of the good version loads all; before 254, all is lost."""
    limit = ("[Unit]", "StartLimitIntervalSec=3s", "StartLimitBurst=2", "[Service]", "RestartSec=0")
    counter.configure(*SETTINGS, *limit)
    put(counter, "1")
    counter.start()
    with counter.connect() as client:
        assert count(client) == 1
        put(counter, "exit")
        failed = upgrade(counter)

        assert failed.returncode == 3
        assert "No module named 'no_such_module'" in failed.stderr
        assert eventually(lambda: shown(counter, "ActiveState") == "failed")
        kept = counter.machine.systemd_version >= 254
        again = upgrade(counter)
        assert again.returncode == 3
        assert ("the image of generation 1 is kept" in again.stderr) == kept
        put(counter, "1")
        start = ["systemctl", "start", counter.unit]
        assert eventually(lambda: counter.machine.run(start, check=False).returncode == 0)
        assert ("loaded by restart" in shown(counter, "StatusText")) == kept
        if kept:
            assert count(client) == 2
        else:
            assert client.line() == ""
            with counter.connect() as other:
                assert count(other) == 1


def test_discard_with_the_library(counter: Service) -> None:
    """State and connections go, the listener stays, and the set-aside image is named."""
    put(counter, "2")
    counter.start()
    with counter.connect() as client:
        assert count(client) == 1
        put(counter, "1")
        assert upgrade(counter).returncode == 3
        done = upgrader(counter.machine, "discard", counter.unit)

        assert done.returncode == 0, done.stderr
        assert "image of generation 1 set aside" in done.stdout
        assert client.line() == ""
    with counter.connect() as other:
        assert count(other) == 1
    assert_no_trace(counter)


def test_an_image_that_no_version_can_load(counter: Service) -> None:
    """After N attempts the service starts without it, and the upgrade says what became of it."""
    counter.configure(*SETTINGS, "RestartSec=0", "Environment=UPGRADER_LOAD_ATTEMPTS=1")
    put(counter, "2")
    counter.start()
    put(counter, "1")
    upgrade(counter)

    assert eventually(lambda: shown(counter, "ActiveState") == "active")
    assert "image of generation 1 set aside" in shown(counter, "StatusText")
