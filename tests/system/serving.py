# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services in a machine and their clients outside of it: installs, asks PID 1, connects; asserts nothing."""

import contextlib
import ctypes
import itertools
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.support import SETTLE, Closing, eventually
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.rendezvous import socket_name
from upgrader.protocol.status_text import Status
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call
from upgrader.protocol.varlink_types import Description
from upgrader.tool.instance_client import status

PROGRAMS = Path(__file__).parent / "services"
_PLACE = "/opt/upgrader-tests"
_PORTS = itertools.count(7000)
# Starting an interpreter on a busy CI machine takes seconds.
_UNIT = """\
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=exec
FileDescriptorStoreMax=16
{preserve}
Restart=always
RestartSec=50ms
TimeoutStartSec=20
TimeoutStopSec=20
Environment=PORT={port} UPGRADER_DRAIN_TIMEOUT=5s UPGRADER_LIVE_DRAIN_TIMEOUT=5s
EnvironmentFile=-/run/{name}.env
ExecStart={command}
{more}

[Install]
WantedBy=default.target
"""


class Service:
    """One service in a machine, with a port of its own. A unit that is enabled keeps its FD store."""

    def __init__(
        self, machine: PrivateSystemd, name: str, program: str, more: Sequence[str]
    ) -> None:
        self.machine = machine
        self.name = name
        self.unit = f"{name}.service"
        self.port = next(_PORTS)
        self.command = " ".join([*machine.python, f"{_PLACE}/{program}.py"])
        machine.copy_in(PROGRAMS / f"{program}.py", f"{_PLACE}/{program}.py")
        self.configure(*more)
        machine.run(["systemctl", "enable", self.unit])

    def configure(self, *more: str) -> None:
        """Write the unit with these lines added to its [Service] section, and reload PID 1."""
        self.write(*more)
        self.machine.run(["systemctl", "daemon-reload"])

    def write(self, *more: str) -> None:
        """The same, and PID 1 is not told."""
        known = self.machine.systemd_version >= 254
        text = _UNIT.format(
            name=self.name,
            port=self.port,
            preserve="FileDescriptorStorePreserve=yes" if known else "",
            command=self.command,
            more="\n".join(more),
        )
        path = f"/etc/systemd/system/{self.unit}"
        self.machine.write(path, text)
        self.machine.run(["touch", path])  # PID 1 tells a changed file by its time stamp

    def environment(self, **variables: str) -> None:
        """Set what the next start gets as its environment, without a daemon-reload."""
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        self.inside(f"/run/{self.name}.env").write_text(text)

    # Jobs

    def start(self) -> None:
        self.machine.run(["systemctl", "start", self.unit])

    def stop(self) -> None:
        self.machine.run(["systemctl", "stop", self.unit])

    def restart(self, *, check: bool = True) -> bool:
        """Whether the new instance is up; without `check` it may fail."""
        done = self.machine.run(["systemctl", "restart", self.unit], check=check)
        return done.returncode == 0

    def hold(self, cause: str) -> None:
        """Put a hold on it, as an upgrade that fails now does."""
        text = json.dumps({"unit": self.unit, "since": time.time(), "cause": cause})
        self.machine.write(f"/var/lib/upgrader/hold/{self.unit}", text)

    def signal(self, name: str) -> None:
        """Send a signal to the main process."""
        self.machine.run(["systemctl", "kill", "--kill-whom=main", "-s", name, self.unit])

    def remove(self) -> None:
        """Stop, forget what is stored, and take the unit away."""
        for left in (f"/run/{self.name}.env", f"/var/lib/upgrader/hold/{self.unit}"):
            with contextlib.suppress(FileNotFoundError):
                self.inside(left).unlink()
        self.machine.run(["systemctl", "stop", self.unit], check=False)
        self.machine.run(["systemctl", "disable", self.unit], check=False)
        self.machine.run(["systemctl", "reset-failed", self.unit], check=False)
        self.machine.run(["rm", f"/etc/systemd/system/{self.unit}"])
        self.machine.run(["systemctl", "daemon-reload"])

    # What PID 1 says

    def show(self, *properties: str) -> list[str]:
        """Values of properties of the unit, in their order."""
        text = self.machine.run(["systemctl", "show", "-p", ",".join(properties), self.unit]).stdout
        found = dict(line.split("=", 1) for line in text.splitlines())
        return [found[name] for name in properties]

    @property
    def stored(self) -> int:
        """FDs in the FD store."""
        return int(self.show("NFileDescriptorStore")[0])

    @property
    def stored_names(self) -> set[str]:
        """Their names; from systemd 254 on."""
        asked = ["systemd-analyze", "fdstore", "--no-pager", self.unit]
        return {line.split()[0] for line in self.machine.run(asked).stdout.splitlines() if line}

    @property
    def status(self) -> Status:
        """How the instance that serves came to be; it may have begun just now."""
        found: list[Description] = []

        def answers() -> bool:
            found.extend(self._said())
            return bool(found)

        assert eventually(answers), f"{self.unit}: no instance answers"
        return status(found[0])

    def _said(self) -> list[Description]:
        """What the main process says of itself, if it answers."""
        pid, invocation = self.show("MainPID", "InvocationID")
        with contextlib.suppress(OSError):
            said = msgspec.convert(self.ask("Describe", invocation), Description)
            return [said] if said.pid == int(pid) else []
        return []

    def ask(self, method: str, invocation: str = "") -> dict[str, Any]:
        """Call a method of the instance; raises OSError. The invocation is needed where the unit has
        no RuntimeDirectory=."""
        path = self.inside(f"/run/{self.name}/upgrader.sock")
        with network_of(self.machine):
            sock = socket.socket(socket.AF_UNIX)
        with sock:
            sock.settimeout(SETTLE)
            sock.connect(str(path) if path.parent.exists() else socket_name(invocation))
            return call(sock, f"{INTERFACE}.{method}", {})

    @property
    def pid(self) -> int:
        """The main process, as numbered inside."""
        return int(self.show("MainPID")[0])

    def until(self, **properties: str) -> None:
        """Wait until PID 1 says so."""
        wanted = list(properties.values())
        seen: list[str] = []

        def reached() -> bool:
            seen[:] = self.show(*properties)
            return seen == wanted

        assert eventually(reached), f"{self.unit}: {properties} wanted, {seen} seen"

    def journal(self, *matches: str) -> list[Mapping[str, str]]:
        """Journal entries of the unit, oldest first; ours if one of our fields must match."""
        # journald looks up the unit of a sender when it gets to the entry; who has ended by then
        # has none, but our own field.
        ours = any(match.startswith("UPGRADER_") for match in matches)
        which = [f"UPGRADER_UNIT={self.unit}"] if ours else ["-u", self.unit]
        asked = ["journalctl", "-q", "--no-pager", "-o", "json", *which, *matches]
        self.machine.run(["journalctl", "--sync"])
        return [json.loads(line) for line in self.machine.run(asked).stdout.splitlines()]

    def messages(self, *matches: str) -> str:
        """The texts of those entries."""
        return "\n".join(str(entry["MESSAGE"]) for entry in self.journal(*matches))

    def answers(self) -> bool:
        """Whether the newest instance answers on its socket: it takes the place of the one before
        after it has begun to serve."""
        return bool(self._said())

    # Files inside

    def inside(self, path: str) -> Path:
        """The absolute `path` of the machine, as seen from here."""
        return Path(f"/proc/{self.machine.pid}/root{path}")

    def open_fds(self, pid: int) -> int:
        """How many FDs a process has."""
        return sum(1 for _ in self.inside(f"/proc/{pid}/fd").iterdir())

    # Clients

    def connect(self) -> "Client":
        """A client of the service on 127.0.0.1; raises ConnectionRefusedError."""
        with network_of(self.machine):
            sock = socket.create_connection(("127.0.0.1", self.port), SETTLE)
        return Client(sock)

    @contextlib.contextmanager
    def clients(self, count: int) -> Iterator[list["Client"]]:
        """That many clients, closed at the end."""
        opened: list[Client] = []
        try:
            with network_of(self.machine):
                for _ in range(count):
                    sock = socket.create_connection(("127.0.0.1", self.port), SETTLE)
                    opened.append(Client(sock))
            yield opened
        finally:
            for client in opened:
                client.close()


def hook(machine: PrivateSystemd, *arguments: str, files: str = "") -> str:
    """What the hook of package managers said, with `files` as its standard input; it must end with
    0."""
    command = [*machine.python, "-m", "upgrader.hooks.package_hook", *arguments]
    return machine.run(command, input=files, timeout=120).stderr


class Client(Closing):
    """A client of the line protocol of the programs in services/."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unread = b""

    def send(self, text: str) -> None:
        self.sock.sendall(text.encode())

    def line(self) -> str:
        """The next line without its end; "" at the end of the stream, even if it was reset."""
        while b"\n" not in self._unread:
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                assert not self._unread, f"cut in the middle of a line: {self._unread[:80]!r}"
                return ""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def ask(self, text: str) -> str:
        self.send(text + "\n")
        return self.line()

    def add(self) -> tuple[int, int, int]:
        """Count one more; returns the count of this connection, of all, and the generation."""
        count, total, generation = self.ask("add").split()
        return int(count), int(total), int(generation)

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def network_of(machine: PrivateSystemd) -> Iterator[None]:
    """Sockets that this thread makes meanwhile belong to the network of the machine, for good."""
    clone_newnet = 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{machine.pid}/ns/net") as inner:
        for there in (inner, own):
            if libc.setns(there.fileno(), clone_newnet) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            if there is inner:
                try:
                    yield
                except BaseException:
                    libc.setns(own.fileno(), clone_newnet)
                    raise


#: The fixture of that name: `install(machine, name, program, *lines of [Service])`.
Install = Callable[..., Service]


def allow_many_fds(count: int) -> None:
    """Let this process open that many FDs more than it needs for itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count + 1000, hard), hard))


def outside_pid(service: Service) -> int:
    """The main process of a service, as numbered out here."""
    group = service.show("ControlGroup")[0]
    return int(service.inside(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split()[0])


def kill(pid: int, number: int) -> None:
    os.kill(pid, number)
