# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live upgrades of services in a machine: units for them, reloads, crowds of clients; asserts what
clients must never notice."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support import SETTLE, eventually
from tests.system.serving import Client, Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.private_systemd.command import InsideCommand


def live(machine: PrivateSystemd, name: str) -> list[str]:
    """What a unit needs for live upgrades."""
    return [
        f"ExecReload={' '.join(machine.python)} -m upgrader.takeover",
        "NotifyAccess=exec",
        "OOMPolicy=continue",
        f"RuntimeDirectory={name}",
        "RuntimeDirectoryPreserve=restart",
        f"Environment=MARK=/run/{name}/mark",
    ]


def reload(service: Service) -> bool:
    """Whether `systemctl reload` says that all went well."""
    command = ["systemctl", "reload", service.unit]
    return service.machine.run(command, check=False).returncode == 0


def socket_there(service: Service) -> bool:
    """Whether the instance answers; it does so a little later than it serves."""
    return eventually(service.inside(f"/run/{service.name}/upgrader.sock").exists)


def installed(
    machine: PrivateSystemd, install: Install, name: str, *more: str, program: str = "holder"
) -> Service:
    """A service that runs and can be upgraded live."""
    service = install(machine, name, program, *live(machine, name), *more)
    assert socket_there(service)
    return service


def processes(service: Service) -> list[str]:
    """All processes of the service, as numbered inside."""
    (group,) = service.show("ControlGroup")
    found = service.machine.run(["cat", f"/sys/fs/cgroup{group}/cgroup.procs"], check=False)
    return found.stdout.split()


def alone(service: Service) -> bool:
    """Whether the main process is all that there is, after a while."""
    return eventually(lambda: [str(service.pid)] == processes(service))


class Paused:
    """A reload under way whose new version waits at a step."""

    def __init__(self, service: Service, command: InsideCommand) -> None:
        self.service = service
        self._command = command
        self.source = service.pid
        self.takeover = int(service.show("ControlPID")[0])
        self.destination = next(
            int(pid) for pid in processes(service) if int(pid) not in (self.source, self.takeover)
        )

    def signal(self, name: str, pid: int) -> None:
        self.service.machine.run(["kill", "-s", name, str(pid)])

    def go(self) -> None:
        """Let the new version go on."""
        self.service.inside(f"/run/{self.service.name}/go").touch()

    @property
    def ended(self) -> bool:
        return self._command.poll() is not None

    def wait(self) -> bool:
        """Whether `systemctl reload` says that all went well."""
        return self._command.wait(SETTLE * 2) == 0

    def said(self) -> Any:
        """What `upgrader upgrade --json` has said, its exit code included."""
        text, _ = self._command.communicate(timeout=SETTLE * 3)
        said = json.loads(text)
        assert self._command.returncode == said["exit_code"]
        return said


@contextlib.contextmanager
def paused(
    service: Service, step: str, command: Sequence[str] = ("systemctl", "reload"), **variables: str
) -> Iterator[Paused]:
    """Upgrade, by a reload or by another command, into a version that waits at a step until told to
    go on."""
    for name in ("mark", "go"):
        service.inside(f"/run/{service.name}/{name}").unlink(missing_ok=True)
    assert socket_there(service)
    service.environment(STEP=step, **variables)
    with service.machine.popen(
        [*command, service.unit], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as asked:
        there = service.inside(f"/run/{service.name}/mark")
        assert eventually(there.exists), service.messages()
        try:
            yield Paused(service, asked)
        finally:
            service.environment()  # whatever is started from here on waits for nothing
            # Whoever is still stopped would be in the way of the next test.
            service.machine.run(["systemctl", "kill", "-s", "CONT", service.unit], check=False)
            service.inside(f"/run/{service.name}").mkdir(exist_ok=True)
            service.inside(f"/run/{service.name}/go").touch()
            if not eventually(lambda: asked.poll() is not None):
                asked.kill()


class Crowd:
    """Clients of the service, each with half a line on its way; they count what they have added."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = clients
        self.others = 0  #: what other clients have added
        self.added = 0
        self.add(generation=1)
        self.begin()

    def begin(self) -> None:
        """Send half a line."""
        for client in self.clients:
            client.send("ad")

    def add(self, generation: int, *, half: bool = False) -> None:
        """All of them count one more, and it is answered by an instance of that generation."""
        self.added += 1
        for client in self.clients:
            client.send("d\n" if half else "add\n")
            count, total, seen = map(int, client.line().split())
            assert (self.added, generation) == (count, seen)
        assert total == self.added * len(self.clients) + self.others

    def is_served_by(self, generation: int) -> None:
        """The half lines arrive, and nothing was lost; and again there is half a line."""
        self.add(generation, half=True)
        self.begin()


@contextlib.contextmanager
def crowd(service: Service, size: int = 3) -> Iterator[Crowd]:
    """That many clients of a service of generation 1."""
    with service.clients(size) as clients:
        yield Crowd(clients)


def reload_twice(service: Service, clients: Crowd) -> None:
    """Upgrade from generation 1 to 3: after each reload the newest serves all clients, and runs alone."""
    for generation in (2, 3):
        assert socket_there(service)
        service.environment(ROUND=str(generation))
        assert reload(service), service.messages()
        clients.is_served_by(generation)
        assert alone(service)


def kill_after_the_commit(service: Service) -> None:
    """A destination that is killed before its source can name it: Restart= starts another instance."""
    with paused(service, "verify") as upgrade:
        upgrade.signal("STOP", upgrade.source)
        upgrade.go()
        with service.connect() as other:
            assert 2 == other.add()[2]
            upgrade.signal("KILL", upgrade.destination)
        upgrade.signal("CONT", upgrade.source)

        upgrade.wait()  # a failure, unless its job has become part of the restart
        service.until(ActiveState="active", NRestarts="1")
