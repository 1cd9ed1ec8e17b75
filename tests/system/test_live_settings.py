# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live upgrades of units whose settings have changed, and what a new main process gets from PID 1."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.support import eventually
from tests.system.reloading import alone, crowd, live, paused, reload, reload_twice, socket_there
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

#: What is another one in each process.
OWN = {"SYSTEMD_EXEC_PID", "WATCHDOG_PID", "JOURNAL_STREAM", "CREDENTIALS_DIRECTORY", "ROUND"}


def status(service: Service, name: str) -> str:
    """A line of /proc/PID/status of the main process."""
    lines = service.inside(f"/proc/{service.pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)[name]


def has_variable(service: Service) -> bool:
    return b"COLOUR=blue" in service.inside(f"/proc/{service.pid}/environ").read_bytes()


def cannot_write(service: Service) -> bool:
    touch = ["nsenter", "-t", str(service.pid), "-m", "touch", "/usr/touched"]
    return service.machine.run(touch, check=False).returncode != 0


def has_its_own_tmp(service: Service) -> bool:
    mounts = service.inside(f"/proc/{service.pid}/mountinfo").read_text().splitlines()
    return any(line.split()[4] == "/tmp" and "systemd-private" in line for line in mounts)


def is_filtered(service: Service) -> bool:
    return status(service, "Seccomp") == "2"


def is_bounded(service: Service) -> bool:
    return int(status(service, "CapBnd"), 16) == 1 << 10


#: A private /tmp would hide a checkout that lies there.
CHECKOUT = f"BindReadOnlyPaths=-{Path(__file__).parents[2]}"
SETTINGS: dict[str, Callable[[Service], bool]] = {
    "Environment=COLOUR=blue": has_variable,
    "ProtectSystem=strict": cannot_write,
    "PrivateTmp=yes": has_its_own_tmp,
    "SystemCallFilter=@system-service": is_filtered,
    "CapabilityBoundingSet=CAP_NET_BIND_SERVICE": is_bounded,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_changed_setting(host_machine: PrivateSystemd, install: Install, setting: str) -> None:
    """Nothing else has changed: the reload is an upgrade, into the new setting."""
    applies = SETTINGS[setting]
    service = install(host_machine, "set", "lively", *live(host_machine, "set"), CHECKOUT)
    with crowd(service) as clients:
        assert socket_there(service)
        assert not applies(service)
        service.configure(*live(host_machine, "set"), setting, CHECKOUT)

        assert reload(service), service.messages()

        assert applies(service)
        clients.is_served_by(2)
        assert alone(service)
        assert reload(service)
        assert 2 == service.status.generation  # nothing has changed since


def test_all_settings_at_once(trixie_machine: PrivateSystemd, install: Install) -> None:
    """And a restart after that is under the same ones."""
    service = install(trixie_machine, "set", "lively", *live(trixie_machine, "set"))
    with crowd(service) as clients:
        assert socket_there(service)
        service.configure(*live(trixie_machine, "set"), *SETTINGS, CHECKOUT)

        assert reload(service), service.messages()

        assert all(applies(service) for applies in SETTINGS.values())
        clients.is_served_by(2)
        service.restart()
        clients.is_served_by(3)


def refused(service: Service, *reasons: str) -> None:
    """A reload fails and says why."""
    assert not reload(service)
    said = service.messages()
    for reason in reasons:
        assert reason in said, said


def test_another_user(any_machine: PrivateSystemd, install: Install) -> None:
    """Not live; and the message says what PID 1 has done by then. A restart does it."""
    lines = live(any_machine, "other")
    service = install(any_machine, "other", "lively", *lines, "User=daemon")
    with crowd(service) as clients:
        assert socket_there(service)
        service.configure(*lines, "User=bin")

        refused(
            service,
            "User= has changed: it runs as uid 1, and would as uid 2",
            "systemd has by now given its directories to the new user",
            "upgrader restart other.service",
        )

        clients.is_served_by(1)
        assert alone(service)
        service.restart()
        clients.is_served_by(2)


def test_a_dynamic_user(any_machine: PrivateSystemd, install: Install) -> None:
    """As in the sample unit: without root, and with a directory of its own."""
    ping = ["systemd-run", "-q", "--pipe", "-p", "DynamicUser=yes", "busctl", "status"]
    if any_machine.run(ping, check=False).returncode != 0:
        pytest.skip("the bus of this machine does not know dynamic users")
    lines = [*live(any_machine, "dynamic"), "DynamicUser=yes", "ProtectSystem=strict"]
    service = install(any_machine, "dynamic", "lively", *lines)
    with crowd(service) as clients:
        reload_twice(service, clients)


def test_a_pid_namespace(trixie_machine: PrivateSystemd, install: Install) -> None:
    """Not live: the new version could not even see the running one."""
    lines = live(trixie_machine, "hidden")
    service = install(trixie_machine, "hidden", "lively", *lines)
    with crowd(service) as clients:
        assert socket_there(service)
        service.configure(*lines, "PrivatePIDs=yes")

        refused(service, "PrivatePIDs= hides the running instance", "upgrader restart")

        clients.is_served_by(1)
        assert alone(service)


def test_control_processes_in_a_cgroup_of_their_own(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """With Delegate=yes: the new main process lives where the one before does, whoever it is."""
    lines = [*live(any_machine, "delegated"), "Delegate=yes", "User=daemon"]
    service = install(any_machine, "delegated", "lively", *lines)
    with crowd(service) as clients:
        there = cgroup(service)
        for generation in (2, 3):
            assert socket_there(service)
            service.environment(ROUND=str(generation))
            assert reload(service), service.messages()
            clients.is_served_by(generation)
            assert there == cgroup(service)
            assert alone(service)  # else the next stop may find what is left of the one before
        service.restart()
        clients.is_served_by(4)
    service.stop()
    assert "SIGKILL" not in service.messages()


def cgroup(service: Service) -> str:
    """Where the main process is."""
    return service.inside(f"/proc/{service.pid}/cgroup").read_text()


def test_a_cgroup_that_nobody_may_write_to(any_machine: PrivateSystemd, install: Install) -> None:
    """Not live, then: the new main process would not be where a start puts it."""
    lines = [*live(any_machine, "confined"), "Delegate=yes", "ProtectControlGroups=yes", CHECKOUT]
    service = install(any_machine, "confined", "lively", *lines)
    with crowd(service) as clients:
        assert socket_there(service)
        service.environment(ROUND="2")

        refused(service, "Delegate=: the new version cannot be put", "upgrader restart confined")

        clients.is_served_by(1)
        assert alone(service)


@contextlib.contextmanager
def giving_way(service: Service) -> Iterator[threading.Event]:
    """Look at all processes of the machine, all the time; the event is set once one lets all others go first."""
    seen, over = threading.Event(), threading.Event()

    def look() -> None:
        while not over.is_set():
            for process in service.inside("/proc").glob("[0-9]*/autogroup"):
                with contextlib.suppress(OSError):
                    if process.read_text().endswith(" nice 19\n"):
                        seen.set()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()


def test_who_goes_first(host_machine: PrivateSystemd, install: Install) -> None:
    """While the new version starts, the running one; once it is prepared, or takes long, they are alike."""
    service = install(host_machine, "first", "lively", *live(host_machine, "first"), "User=daemon")
    if not service.inside(f"/proc/{service.pid}/autogroup").exists():
        pytest.skip("this kernel has no autogroups")
    assert "nice 0" in service.inside(f"/proc/{service.pid}/autogroup").read_text()
    with giving_way(service) as seen:
        for generation in range(2, 22):
            assert socket_there(service)
            service.environment(ROUND=str(generation))
            assert reload(service), service.messages()
            weight = service.inside(f"/proc/{service.pid}/autogroup")
            assert eventually(lambda weight=weight: weight.read_text().endswith(" nice 0\n"))
            if seen.is_set():
                break
            time.sleep(0.2)  # the kernel takes one change in a tenth of a second, from all users
    assert seen.is_set()


def test_the_kill_switch(host_machine: PrivateSystemd, install: Install) -> None:
    """UPGRADER=off: a reload is the author's own as ever, and nothing is upgraded."""
    lines = live(host_machine, "off")
    service = install(host_machine, "off", "lively", *lines, "Environment=UPGRADER=off")
    with crowd(service) as clients:
        assert socket_there(service)
        assert reload(service), service.messages()
        assert "asked to reload" in service.messages()
        service.configure(*lines)
        refused(service, "UPGRADER=off: it is a plain service")
        clients.is_served_by(1)
    service.restart()
    with crowd(service) as clients:
        assert socket_there(service)
        service.configure(*lines, "Environment=UPGRADER=off")
        refused(service, "UPGRADER=off in the unit makes a plain service of it")
        clients.is_served_by(1)


# What PID 1 gives to a main process


def test_the_environment_of_a_start(any_machine: PrivateSystemd, install: Install) -> None:
    """Name by name, and value by value where the values are not those of one process."""
    any_machine.write("/run/key", "secret\n")
    name = "given"
    service = install(
        any_machine, name, "lively", *live(any_machine, name),
        "WatchdogSec=5", "LoadCredential=key:/run/key", "PrivateTmp=yes", CHECKOUT,
        f"StateDirectory={name}",
    )  # fmt: skip
    with crowd(service):
        started = json.loads(ask(service, "environment"))
        # Where systemd may not mount, in a container for one, the file is missing from the start.
        credential = ask(service, "credential key")
        assert credential in ("secret", "missing")
        for generation in (2, 3):
            assert socket_there(service)
            service.environment(ROUND=str(generation))
            assert reload(service), service.messages()
            given = json.loads(ask(service, "environment"))
            more = {"UPGRADER_TAKEOVER", "UPGRADER_UPGRADE", "ROUND"}
            assert set(started) | more == set(given)
            assert given["SYSTEMD_EXEC_PID"] == given["WATCHDOG_PID"] == str(service.pid)
            assert {n: v for n, v in started.items() if n not in OWN} == {
                n: v for n, v in given.items() if n in started and n not in OWN
            }
            assert credential == ask(service, "credential key")


#: What the words of a command line are made of.
PIECES = ["$", "{", "}", "'", '"', "\\", ":", " ", "-", "x", "$$", "${A}", "${B}", "$C", "D"]
VALUES = {"A": "a", "B": "b  c", "C": "it's '' d\\ e \"f", "D": "", "BA": "x"}
#: Variables that PID 1 makes, in words of their own.
MADE = [
    "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "WATCHDOG_PID", "WATCHDOG_USEC", "USER", "HOME",
    "SYSTEMD_EXEC_PID", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "INVOCATION_ID", "NOTIFY_SOCKET",
    "LANG", "LC_CTYPE", "PATH", "MAINPID", "FDSTORE", "PORT", "NO_SUCH_VARIABLE", "1", "",
]  # fmt: skip


def quoted(text: str) -> str:
    """A word of a unit file that is this text, whatever is in it; systemd.syntax(7)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def arguments(service: Service) -> list[str]:
    """The command line of the main process, with its PID as a word."""
    own = str(service.pid)
    words = service.inside(f"/proc/{own}/cmdline").read_text().split("\0")[:-1]
    return [word.replace(f"pid={own}.", "pid=own.") for word in words]


def test_the_command_line_of_a_start(any_machine: PrivateSystemd) -> None:
    """Hundreds of words with variables in them: what PID 1 makes of them at a start, takeover makes
    at a live upgrade, and again at the next; so nothing has changed then, either."""
    random = Random(7)
    words = ["".join(random.choices(PIECES, k=random.randint(1, 6))) for _ in range(500)]
    words += [f"{name}=${{{name}}}" for name in MADE if not name.endswith("PID")]
    words += [f"pid=${{{name}}}." for name in MADE if name.endswith("_PID")]
    words += [f"${name}" for name in MADE if not name.endswith("PID")]
    name = "worded"
    requires = f"\n[Unit]\nRequires={name}.socket\nAfter={name}.socket"
    more = [*live(any_machine, name), "WatchdogSec=60", f"StateDirectory={name}", CHECKOUT]
    values = " ".join(quoted(f"{n}={v}") for n, v in VALUES.items())
    service = Service(any_machine, name, "lively", more)
    start = f"ExecStart={service.command} {' '.join(quoted(word) for word in words)}"
    any_machine.write(
        f"/etc/systemd/system/{name}.socket",
        f"[Socket]\nListenStream=127.0.0.1:{service.port}\nFileDescriptorName=door\n",
    )
    try:
        service.configure(*more, f"Environment={values}", "ExecStart=", start, requires)
        service.start()
        started = arguments(service)
        assert len(started) > 400
        assert {"LISTEN_FDS=1", "LISTEN_FDNAMES=door", "pid=own."} <= set(started)
        with crowd(service) as clients:
            for generation in (2, 3):
                assert socket_there(service)
                service.environment(ROUND=str(generation))
                assert reload(service), service.messages()
                clients.is_served_by(generation)
                assert started == arguments(service)
            assert socket_there(service)
            assert reload(service), service.messages()
            clients.is_served_by(3)
            assert "asked to reload" in service.messages()
    finally:
        service.remove()
        any_machine.run(["systemctl", "stop", f"{name}.socket"])
        any_machine.run(["rm", f"/etc/systemd/system/{name}.socket"])
        any_machine.run(["systemctl", "daemon-reload"])


def ask(service: Service, question: str) -> str:
    with service.connect() as client:
        return client.ask(question)


def test_a_watchdog(any_machine: PrivateSystemd, install: Install) -> None:
    """A freeze longer than WatchdogSec= kills nobody, and the new main process is watched, too."""
    name = "watched"
    service = install(
        any_machine, name, "lively", *live(any_machine, name), "WatchdogSec=1",
        "Environment=UPGRADER_DOWNTIME_LIMIT=20s",
    )  # fmt: skip
    with crowd(service) as clients:
        with paused(service, "verify") as upgrade:
            time.sleep(2.5)  # there is no event for a watchdog that does nothing
            upgrade.go()
            assert upgrade.wait(), service.messages()
        clients.is_served_by(2)
        time.sleep(2.5)
        service.until(NRestarts="0", ActiveState="active", MainPID=str(upgrade.destination))
        clients.is_served_by(2)
        service.signal("STOP")
        service.until(NRestarts="1", ActiveState="active")
    assert "Watchdog timeout" in service.messages()


# Sockets of PID 1


def test_a_socket_unit(any_machine: PrivateSystemd) -> None:
    """Its listener moves, and stays out of the FD store, which is not where it comes from; a changed
    one needs a restart of both, which keeps connections."""
    name = "activated"
    requires = f"\n[Unit]\nRequires={name}.socket\nAfter={name}.socket"
    service = Service(any_machine, name, "lively", [*live(any_machine, name), requires])
    port = service.port + 10_000

    def listen(address: str) -> None:
        any_machine.write(
            f"/etc/systemd/system/{name}.socket",
            f"[Socket]\nListenStream={address}\nFileDescriptorName=door\n",
        )
        any_machine.run(["systemctl", "daemon-reload"])

    listen(f"127.0.0.1:{service.port}")
    try:
        any_machine.run(["systemctl", "start", f"{name}.socket"])
        service.start()
        with crowd(service) as clients:
            assert 0 == service.stored
            for generation in (2, 3):
                assert socket_there(service)
                service.environment(ROUND=str(generation), BIND="127.0.0.1:1")
                assert reload(service), service.messages()
                clients.is_served_by(generation)
                assert eventually(lambda: Origin.LIVE is service.status.origin)
            service.restart()
            clients.is_served_by(4)
            assert 0 == service.stored
            assert socket_there(service)
            listen(f"127.0.0.1:{port}")
            service.environment(ROUND="5")

            refused(
                service,
                f"{name}.socket has changed: the running instance has not got 127.0.0.1:{port}",
                f"systemctl restart {name}.socket",
            )

            clients.is_served_by(4)
            any_machine.run(["systemctl", "restart", f"{name}.socket"])
            clients.is_served_by(5)
            service.port, old = port, service.port
            with service.connect() as client:
                assert 5 == client.add()[2]
            service.port = old
    finally:
        service.remove()
        any_machine.run(["systemctl", "stop", f"{name}.socket"])
        any_machine.run(["rm", f"/etc/systemd/system/{name}.socket"])
        any_machine.run(["systemctl", "daemon-reload"])


# What else may be in a unit


def test_exec_start_pre(host_machine: PrivateSystemd, install: Install) -> None:
    """It belongs to a start: a live upgrade does not run it, a restart does."""
    name = "prepared"
    there = f"/run/{name}.prepared"
    line = f"ExecStartPre=/bin/sh -c 'echo once >> {there}'"
    service = install(host_machine, name, "lively", *live(host_machine, name), line)
    runs = service.inside(there)
    with crowd(service) as clients:
        assert socket_there(service)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(2)
        assert 1 == len(runs.read_text().splitlines())
        service.restart()
        clients.is_served_by(3)
        assert 2 == len(runs.read_text().splitlines())
    runs.unlink()


def test_no_memory_for_two(host_machine: PrivateSystemd, install: Install) -> None:
    """Refused before anything is started; a restart needs no second one."""
    there = host_machine.run(["cat", "/sys/fs/cgroup/cgroup.controllers"]).stdout.split()
    if "memory" not in there:
        pytest.skip("the memory controller is not on cgroup2")
    service = install(host_machine, "narrow", "lively", *live(host_machine, "narrow"))
    with crowd(service) as clients:
        assert socket_there(service)
        used = int(service.show("MemoryCurrent")[0])
        service.configure(*live(host_machine, "narrow"), f"MemoryMax={used + (1 << 20)}")
        service.environment(ROUND="2")

        refused(service, "MemoryMax= leaves", "upgrader restart narrow.service")

        clients.is_served_by(1)
        service.restart()
        clients.is_served_by(2)


def test_every_line_says_which_generation(host_machine: PrivateSystemd, install: Install) -> None:
    """Those of the new instance are found under the unit, whoever has started it."""
    service = install(host_machine, "told", "lively", *live(host_machine, "told"))
    with crowd(service):
        assert socket_there(service)
        service.environment(FLAW="exit")
        assert not reload(service)
        service.environment(ROUND="2")
        assert reload(service)
        assert socket_there(service)
        assert reload(service)
        assert eventually(lambda: "asked to reload" in service.messages())
    ours = service.journal(f"UPGRADER_UNIT={service.unit}")
    sides = {(entry["UPGRADER_SIDE"], entry["UPGRADER_GENERATION"]) for entry in ours}

    assert {("takeover", "1"), ("source", "1"), ("destination", "2")} <= sides
    printed = [entry for entry in service.journal() if entry["MESSAGE"] == "asked to reload"]
    assert [str(service.pid)] == [entry["_PID"] for entry in printed]
