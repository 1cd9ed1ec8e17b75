# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader upgrade` and `discard` under a real systemd: what they do, say and return."""

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import eventually
from upgrader.private_systemd import PrivateSystemd

SERVICES = Path(__file__).parent / "services"
#: As nobody, but able to read a Python that lies in a private directory.
NOBODY = (
    *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
_numbers = itertools.count(1)


@dataclass
class Service:
    """A service inside a machine, and the command line used on it."""

    machine: PrivateSystemd
    program: str
    arguments: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    start_limit: str = "StartLimitIntervalSec=10s"
    name: str = field(default_factory=lambda: f"upgraded{next(_numbers)}")

    @property
    def unit(self) -> str:
        return f"{self.name}.service"

    @property
    def next_version(self) -> str:
        return f"/run/{self.name}-next"

    def install(self, **settings: str) -> None:
        """Write the unit file; PID 1 is not told."""
        python = " ".join(self.machine.python)
        lines = {
            "Type": "notify",
            "NotifyAccess": "exec",
            "FileDescriptorStoreMax": "16",
            "Restart": "always",
            "RestartSec": "60s",
            "TimeoutStartSec": "2s",
            "ExecStart": f"{python} /srv/{self.program} {self.next_version} {self.arguments}",
        }
        if self.machine.systemd_version >= 254:
            lines["FileDescriptorStorePreserve"] = "yes"
        lines |= self.settings | settings
        text = "".join(f"{name}={value}\n" for name, value in lines.items())
        path = f"/run/systemd/system/{self.unit}"
        self.machine.write(path, f"[Unit]\n{self.start_limit}\n[Service]\n{text}")
        # PID 1 tells a changed file by its time stamp.
        self.machine.run(["touch", path])

    def put(self, version: str) -> None:
        """What the next start runs."""
        self.machine.write(self.next_version, version)

    def start(self, version: str) -> None:
        """Install and start."""
        self.machine.copy_in(SERVICES / self.program, f"/srv/{self.program}")
        self.put(version)
        self.install()
        self.systemctl("daemon-reload")
        self.systemctl("start", self.unit)

    def systemctl(self, *arguments: str) -> str:
        return self.machine.run(["systemctl", *arguments]).stdout.strip()

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", "-p", name, self.unit)

    def now(self) -> list[str]:
        """What an upgrade changes, and a refused one must not."""
        return self.systemctl(
            "show", "--value", "-p", "InvocationID,ActiveState,StatusText,NFileDescriptorStore",
            "-p", "Job,DropInPaths,NRestarts", self.unit,
        ).splitlines()  # fmt: skip

    def cli(
        self, *arguments: str, before: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `upgrader` inside."""
        return self.machine.run([*before, "upgrader", *arguments], check=False, env=env)

    def upgrade(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.cli("upgrade", "--quiet", self.unit, *arguments)

    def remove(self) -> None:
        """Stop it at once, and have PID 1 forget it, and what it stores for it."""
        self.machine.run(["systemctl", "kill", "-s", "KILL", self.unit], check=False)
        self.machine.run(["systemctl", "stop", self.unit], check=False)
        self.machine.run(["systemctl", "clean", "--what=fdstore", self.unit], check=False)
        self.machine.run(["rm", "-rf", f"/run/systemd/system/{self.unit}", self.next_version])
        self.systemctl("daemon-reload")
        self.machine.run(["systemctl", "reset-failed", self.unit], check=False)


@pytest.fixture
def service(any_machine: PrivateSystemd) -> Iterator[Service]:
    """A service that keeps the library's contract and fails as told, started."""
    made = Service(any_machine, "contract.py")
    made.start("good")
    yield made
    made.remove()


@pytest.fixture
def counter(any_machine: PrivateSystemd) -> Iterator[Service]:
    """A service with the real library; not started."""
    made = Service(any_machine, "counter.py", arguments="7007")
    yield made
    made.remove()


# Done


def test_success_is_one_line(service: Service) -> None:
    """An upgrade that is done prints one line, ends with 0, and another instance serves."""
    before = service.show("InvocationID")
    done = service.cli("upgrade", service.name)

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{service.unit}: upgraded in ")
    assert "generation 2, loaded by restart from generation 1" in line
    assert "the new instance starts" in done.stderr
    assert service.show("InvocationID") != before


def test_json_tells_before_and_after(service: Service) -> None:
    """With --json, one object tells the outcome, both instances and the pause."""
    done = service.upgrade("--json")
    shown = json.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert (shown["result"], shown["serves"], shown["exit_code"]) == ("done", True, 0)
    assert shown["before"]["generation"] == shown["after"]["source_generation"] == 1
    assert 0 < shown["pause_seconds"] < shown["seconds"]
    assert shown["systemd"].startswith(str(service.machine.systemd_version))


def test_a_changed_unit_file_is_reloaded_first(service: Service) -> None:
    """The new instance runs with the unit file that is on disk now."""
    service.install(Environment="NEW=1")
    done = service.cli("upgrade", service.unit)

    assert done.returncode == 0, done.stderr
    assert "daemon-reload" in done.stderr
    assert service.show("Environment") == "NEW=1"


def test_an_alias_is_resolved(service: Service) -> None:
    """A unit may be named by an alias; the line names the unit."""
    alias = f"/run/systemd/system/also-{service.unit}"
    service.machine.run(["ln", "-sf", service.unit, alias])
    service.systemctl("daemon-reload")
    done = service.cli("upgrade", f"also-{service.name}")
    service.machine.run(["rm", alias])

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{service.unit}: upgraded")


def test_many_upgrades_in_a_row(service: Service) -> None:
    """Upgrades never run into StartLimitBurst=, which would stop a service that serves."""
    for _ in range(7):
        done = service.upgrade()
        assert done.returncode == 0, done.stderr

    assert service.show("StatusText").startswith("generation 8,")


def test_the_limit_of_252_is_told(service: Service) -> None:
    """Where a failed start could lose the image, a warning says so; elsewhere there is none."""
    done = service.cli("upgrade", service.unit)

    old = service.machine.systemd_version < 254
    assert ("warning: after a failed start the image is kept only while" in done.stderr) == old
    service.install(FileDescriptorStorePreserve="restart", Restart="no")
    done = service.cli("upgrade", service.unit)
    assert done.returncode == 0, done.stderr
    assert "warning: a new version that does not start loses the image at once" in done.stderr


def test_two_at_once(service: Service) -> None:
    """Of two upgrades at the same time each is done or refused as busy, and the service serves."""
    command = ["upgrader", "upgrade", "--quiet", service.unit]
    running = [service.machine.popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    said = [each.communicate(timeout=60)[1] for each in running]
    codes = sorted(each.returncode for each in running)

    assert codes in ([0, 0], [0, 75]), said
    assert "loaded by restart" in service.show("StatusText")


def test_waiting_for_ever(service: Service) -> None:
    """`--timeout infinity` is understood, as systemd writes it."""
    assert service.upgrade("--timeout", "infinity").returncode == 0


# Refused: nothing is changed


def test_a_mistyped_unit(service: Service) -> None:
    """A unit that does not exist is 4, and one that looks like it is offered."""
    done = service.cli("upgrade", service.name.replace("upgraded", "upgarded"))

    assert done.returncode == 4
    assert "there is no such unit" in done.stderr
    assert "did you mean upgraded" in done.stderr


def test_a_unit_that_does_not_use_the_library(any_machine: PrivateSystemd) -> None:
    """A foreign unit is left alone: 1, for it serves."""
    dbus = Service(any_machine, "", name="dbus")
    before = dbus.now()
    done = dbus.upgrade()

    assert done.returncode == 1
    assert "it serves as before: it does not use upgrader" in done.stderr
    assert dbus.now() == before


def test_without_permission(service: Service) -> None:
    """An unprivileged user is told so: 4, and nothing is changed."""
    before = service.now()
    done = service.cli("upgrade", "--quiet", service.unit, before=NOBODY)
    # Asking without permission starts it, where there is one.
    service.machine.run(["systemctl", "stop", "polkit.service"], check=False)

    assert done.returncode == 4, done.stderr
    assert "systemd does not allow you to" in done.stderr
    assert "as root" in done.stderr
    assert service.now() == before


def test_without_a_bus(service: Service) -> None:
    """Without a bus it is 4, and the remedy says where to look."""
    before = service.now()
    nowhere = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"}
    done = service.cli("upgrade", service.unit, env=nowhere)

    assert done.returncode == 4
    assert "systemd cannot be reached over D-Bus: No such file or directory" in done.stderr
    assert "systemctl status dbus.socket" in done.stderr
    assert service.now() == before


@pytest.mark.parametrize(
    ("setting", "value"), [("FileDescriptorStoreMax", "0"), ("Type", "simple")]
)
def test_a_setting_that_would_lose_the_image(service: Service, setting: str, value: str) -> None:
    """A unit file that defeats the upgrade is refused, the setting named, nothing restarted."""
    service.install(**{setting: value})
    before = service.show("InvocationID")
    done = service.upgrade()

    assert done.returncode == 1
    assert f"{setting}={value} in the unit" in done.stderr
    assert f"systemctl edit {service.unit}" in done.stderr
    assert service.show("InvocationID") == before


def test_while_another_job_is_in_flight(service: Service) -> None:
    """A job in the way is 75, named, and not replaced; the same for discard."""
    service.put("hang")
    service.systemctl("restart", "--no-block", service.unit)
    assert eventually(lambda: service.show("SubState") == "start")
    before = service.now()

    for verb in ("upgrade", "discard"):
        done = service.cli(verb, service.unit)
        assert done.returncode == 75, done.stderr
        assert "busy: a start job (id " in done.stderr
    assert service.now() == before


def test_a_unit_that_does_not_run(service: Service) -> None:
    """A stopped unit is 3, and how to start it is said."""
    service.systemctl("stop", service.unit)
    service.systemctl("reset-failed")
    done = service.upgrade()

    assert done.returncode == 3
    assert "NOT SERVING: it is not running (inactive)" in done.stderr
    assert f"systemctl start {service.unit}" in done.stderr
    assert service.show("ActiveState") == "inactive"


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
    """It is 3, the cause is named, and with the good version back everything is loaded."""
    service.put(version)
    done = service.upgrade()

    assert done.returncode == 3
    assert done.stdout == ""
    line, *remedy = done.stderr.splitlines()
    assert line.startswith(f"{service.unit}: not upgraded, NOT SERVING: ")
    assert cause in line
    assert any("is kept" in each for each in remedy)
    assert f"  to try at once: systemctl restart {service.unit}" in remedy
    service.put("good")
    service.systemctl("restart", service.unit)
    assert "generation 2, loaded by restart from generation 1" in service.show("StatusText")


def test_a_program_that_is_not_there(service: Service) -> None:
    """systemd's own words are the cause where the program could not even be run."""
    service.install(ExecStart="/srv/is-not-there")
    done = service.upgrade()

    assert done.returncode == 3
    assert "/srv/is-not-there" in done.stderr
    assert "No such file" in done.stderr


def test_what_is_lost_is_said_to_be_lost(service: Service) -> None:
    """Where PID 1 has closed the store, nobody is told that the image is kept."""
    service.install(FileDescriptorStorePreserve="restart", Restart="no")
    service.put("exit")
    done = service.upgrade()

    assert done.returncode == 3
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
    service.put(version)
    done = service.upgrade()

    assert done.returncode == 1
    assert f"serving, but started without the image: {cause}" in done.stderr


def test_an_old_instance_that_does_not_stop(service: Service) -> None:
    """The cause is that the old instance was killed before it parked, not the cold start."""
    service.put("stuck")
    service.install(TimeoutStopSec="1s")
    assert service.upgrade().returncode == 0
    service.put("good")
    done = service.upgrade()

    assert done.returncode == 1
    assert "the old instance did not stop within TimeoutStopSec=1s" in done.stderr


def test_a_timeout_of_the_caller(service: Service) -> None:
    """When --timeout is over it is 3, and systemd's job goes on."""
    service.put("hang")
    done = service.upgrade("--timeout", "200ms")

    assert done.returncode == 3
    assert "not ready after 0.2s (--timeout)" in done.stderr
    assert service.show("Job") not in ("", "0")


# Discard


def unreadable(service: Service) -> None:
    """Bring the service where only a discard, or a good version, helps."""
    service.put("unreadable")
    assert service.upgrade().returncode == 3


def assert_no_trace(service: Service) -> None:
    """Nothing temporary is left of a discard."""
    assert service.show("DropInPaths") == ""
    assert service.show("NeedDaemonReload") == "no"
    assert "UPGRADER_DISCARD" not in service.show("Environment")
    path = f"/run/systemd/system/{service.unit}.d"
    assert service.machine.run(["test", "-e", path], check=False).returncode == 1


def test_discard_starts_without_the_image(service: Service) -> None:
    """The service starts cold, the image is set aside, and no drop-in stays."""
    unreadable(service)
    done = service.cli("discard", service.unit)

    assert done.returncode == 0, done.stderr
    assert f"{service.unit}: started without the image" in done.stdout
    assert "cold start, image of generation 1 set aside" in service.show("StatusText")
    assert_no_trace(service)
    assert service.upgrade().returncode == 3, "the next image is parked and loaded as ever"


def test_discard_of_a_unit_that_serves(service: Service) -> None:
    """Nothing is parked while an instance serves: said, and nothing is done."""
    before = service.now()
    done = service.cli("discard", service.unit)

    assert done.returncode == 0
    assert "no image is parked, nothing to discard" in done.stdout
    assert service.now() == before


def test_discard_without_an_image(service: Service) -> None:
    """A stopped unit with an empty store has nothing to discard: 3, for it does not serve."""
    service.machine.run(["systemctl", "kill", "-s", "KILL", service.unit])
    assert eventually(lambda: service.show("SubState") == "auto-restart")
    done = service.cli("discard", service.unit)

    assert done.returncode == 3
    assert "no image is parked for it" in done.stderr


@pytest.mark.parametrize(("signal", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_an_interrupted_discard_leaves_nothing(service: Service, signal: str, code: int) -> None:
    """Ctrl-C, SIGTERM and a lost terminal remove the drop-in, too."""
    unreadable(service)
    service.put("hang")
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


@dataclass
class Client:
    """A connection to the counter, held from inside the machine."""

    process: "subprocess.Popen[str]"

    def ask(self) -> int:
        """Send a line, get its number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("line\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", 7007)) as sock, sock.makefile("rw") as file:
    for line in sys.stdin:
        file.write(line); file.flush()
        print(file.readline(), end="", flush=True)
"""


@pytest.fixture
def connect(any_machine: PrivateSystemd) -> Iterator[Callable[[], Client]]:
    """Opens connections that are held until the end of the test."""
    clients: list[Client] = []

    def connect() -> Client:
        command = [*any_machine.python, "-u", "-c", CLIENT]
        pipe = subprocess.PIPE
        clients.append(Client(any_machine.popen(command, stdin=pipe, stdout=pipe)))
        return clients[-1]

    yield connect
    for client in clients:
        client.process.communicate(timeout=30)


def test_a_connection_lives_through_upgrades_good_and_bad(
    counter: Service, connect: Callable[[], Client]
) -> None:
    """Bad versions, and each time the good one after: the connection and the count are there."""
    counter.start("2")
    client = connect()
    assert client.ask() == 1
    counter.put("1")
    refused = counter.upgrade()

    assert refused.returncode == 3
    assert "state 'counter'" in refused.stderr
    assert "this program has version 1" in refused.stderr
    counter.put("2")
    counter.systemctl("restart", counter.unit)
    assert client.ask() == 2
    for version, cause in (
        ("exit", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("hang", "not ready within TimeoutStartSec=2s"),
    ):
        counter.put(version)
        failed = counter.upgrade()
        assert failed.returncode == 3
        assert cause in failed.stderr
        counter.put("2")
        counter.systemctl("restart", counter.unit)
        assert client.ask() > 2
    done = counter.upgrade()
    assert done.returncode == 0, done.stderr
    assert "2 FDs" in done.stdout
    assert client.ask() == 5


def test_after_the_start_limit(counter: Service, connect: Callable[[], Client]) -> None:
    """When PID 1 has given up, a start of the good version loads all; before 254, all is lost."""
    counter.settings = {"RestartSec": "0"}
    counter.start_limit = "StartLimitIntervalSec=3s\nStartLimitBurst=2"
    counter.start("1")
    client = connect()
    assert client.ask() == 1
    counter.put("exit")
    failed = counter.upgrade()

    assert failed.returncode == 3
    assert "No module named 'no_such_module'" in failed.stderr
    assert eventually(lambda: counter.show("ActiveState") == "failed")
    kept = counter.machine.systemd_version >= 254
    again = counter.upgrade()
    assert again.returncode == 3
    assert ("it loads the parked image of generation 1" in again.stderr) == kept
    counter.put("1")
    start = ["systemctl", "start", counter.unit]
    assert eventually(lambda: counter.machine.run(start, check=False).returncode == 0)
    assert ("loaded by restart" in counter.show("StatusText")) == kept
    assert (client if kept else connect()).ask() == (2 if kept else 1)


def test_discard_with_the_library(counter: Service, connect: Callable[[], Client]) -> None:
    """State and connections go, the listener stays, and the set-aside image is named."""
    counter.start("2")
    client = connect()
    assert client.ask() == 1
    counter.put("1")
    assert counter.upgrade().returncode == 3
    done = counter.cli("discard", counter.unit)

    assert done.returncode == 0, done.stderr
    assert "image of generation 1 set aside" in done.stdout
    assert connect().ask() == 1
    assert_no_trace(counter)


def test_an_image_that_no_version_can_load(counter: Service) -> None:
    """After N attempts the service starts without it, and the upgrade says what became of it."""
    counter.settings = {"RestartSec": "0", "Environment": "UPGRADER_LOAD_ATTEMPTS=1"}
    counter.start("2")
    counter.put("1")
    counter.upgrade()

    assert eventually(lambda: counter.show("ActiveState") == "active")
    assert "image of generation 1 set aside" in counter.show("StatusText")
