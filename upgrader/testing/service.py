# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service under test: starts, stops, upgrades and ends its processes, and keeps its FDs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from upgrader.protocol.channel import ParkedChannel
from upgrader.protocol.fd import Fd
from upgrader.protocol.image import unseal
from upgrader.protocol.rendezvous import BUS, SOCKET
from upgrader.protocol.status_text import FACTS, Origin, Status, from_json
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.systemd.cgroup import own_unit
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.subreaper import adopt_orphans
from upgrader.testing.leftovers import end_processes_with
from upgrader.testing.live import LiveUpgrade, ServiceError, describe
from upgrader.testing.notify_socket import NotifySocket
from upgrader.testing.pid1_bus import Pid1Bus, Typed
from upgrader.testing.process import AdoptedProcess, Process

_EXEC = """
import fcntl, os, sys
count = int(sys.argv[1])
passed = [int(number) for number in sys.argv[2 : 2 + count]]
high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3 + count) for number in passed]
for number in passed:
    os.close(number)
for index, number in enumerate(high):
    os.dup2(number, 3 + index)
if count:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2 + count], sys.argv[2 + count :])
"""
_COMMANDS = "a(sasasttttuii)"  # of ExecStartEx and its kin


class Service:
    """One service under test. What it stores outlives its processes, until `close`.

    `environment` is added to the caller's, and `timeout` is how many seconds a start, a stop and a
    live upgrade may take; both may be changed at any time, and count from the next one on. This
    process adopts orphans (PR_SET_CHILD_SUBREAPER), as PID 1 does.
    """

    def __init__(
        self, *, environment: Mapping[str, str] | None = None, timeout: float = 30.0
    ) -> None:
        self.status_text = ""  #: The last STATUS= of the program, for people.
        self._facts: Status | None = None
        self.process: Process | None = None  #: The main process, while it runs.
        self.timeout = timeout  #: Seconds for a start, a stop, and a live upgrade.
        self.environment = dict(environment or {})  #: What a start gets beside the caller's own.
        self._replaced: list[Process] = []
        self._command: Sequence[str] = ()
        self._live: LiveUpgrade | None = None
        self._control_pid = 0
        self._job = ""
        self._directory = tempfile.TemporaryDirectory(prefix="upgrader-testing-")
        place = Path(self._directory.name)
        self.runtime_directory = place / "run"  #: RUNTIME_DIRECTORY of its processes.
        self.runtime_directory.mkdir()
        self._stderr = place / "stderr"
        self._ready = False
        self._notify = NotifySocket(place / "notify", self._hear)
        self._bus = Pid1Bus(
            place / "bus", self._properties, lambda: [(own_unit(), self._job)] if self._job else []
        )
        adopt_orphans()

    @property
    def store(self) -> list[tuple[str, Fd]]:
        """The FD store: each FD and its name."""
        return self._notify.store

    @property
    def status(self) -> Status | None:
        """What the instance last said of itself with READY=1; None if it does not use upgrader."""
        return self._facts

    @property
    def draining(self) -> Sequence[Process]:
        """Processes that were replaced by a live upgrade and have not ended."""
        return [process for process in self._replaced if process.poll() is None]

    def describe(self) -> dict[str, Any]:
        """All that the instance says of itself when it is asked; raises ServiceError."""
        return describe(self)

    def start(self, command: Sequence[str]) -> Status:
        """Start a version and wait for READY=1; raises ServiceError with its stderr."""
        self._command = command
        self._ready, self._facts = False, None
        numbers = [str(fd.fileno()) for _, fd in self.store]
        environment = self._environment()
        if numbers:
            environment["LISTEN_FDS"] = str(len(numbers))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self.store)
        with self._notify.lock, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _EXEC, str(len(numbers)), *numbers, *command],
                env=environment,
                pass_fds=[fd.fileno() for _, fd in self.store],
                stderr=stderr,
            )
        status = self._until(lambda status: self._ready)
        if not self._ready:
            self.kill()
            raise ServiceError("did not become ready", self.stderr)
        if status is None:
            raise ServiceError(f"is no instance: status {self.status_text!r}", self.stderr)
        return status

    def stop(self, *, for_good: bool = False) -> None:
        """SIGTERM, as in a restart: the instance parks; or as in a stop `for_good`.

        Raises ServiceError if it does not end.
        """
        assert self.process is not None
        self._job = "stop" if for_good else "restart"
        try:
            for process in (self.process, *self._replaced):
                process.send_signal(signal.SIGTERM)
            status = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServiceError("did not end", self.stderr) from None
        finally:
            self._job = ""
        self.process = None
        self._end_replaced()
        self._notify.settle()
        if status != 0:
            raise ServiceError(f"ended with {status}", self.stderr)

    def restart(self, command: Sequence[str]) -> Status:
        """Restart into another version, which may start anew; raises ServiceError if it does not
        become ready, and what is parked stays parked."""
        self.stop()
        return self.start(command)

    def upgrade(self, command: Sequence[str]) -> Status:
        """Restart into another version.

        Raises ServiceError if it does not become ready (what is parked stays parked), if nothing or
        not every state was parked, if it has not loaded what was, and if datagrams came in between
        for which there was no room.
        """
        self.stop()
        self._require_parked()
        status = self.start(command)
        if status.origin is Origin.COLD:
            raise ServiceError(f"has not loaded what was parked: {status}", self.stderr)
        if status.datagrams_lost:
            raise ServiceError(f"lost {status.datagrams_lost} datagrams", self.stderr)
        return status

    def live(self, command: Sequence[str]) -> Status:
        """Upgrade to another version without a stop: it starts beside the running one, which gives
        it everything.

        Raises ServiceError with the reason and its `code` if the running version serves on.
        """
        return self.begin_live(command).wait()

    def begin_live(self, command: Sequence[str]) -> LiveUpgrade:
        """Begin a live upgrade and return; until its `wait` or `abort`, both versions may run."""
        status = self.status
        assert self.process is not None
        assert status is not None
        describe(self)  # the instance answers a little later than it serves
        with self._notify.lock:  # nobody asks for the control process before it is known
            self._command = command
            self._live = LiveUpgrade(self, status.generation, self._stderr)
            self._control_pid = self._live._begin(self._environment())
        return self._live

    def execute(self, command: Sequence[str]) -> Status:
        """Upgrade to another version by mode exec: the process becomes it.

        Raises ServiceError if the running version serves on, or if the new one does not get ready.
        """
        before = self.status
        assert before is not None
        describe(self)
        self._command = command
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(self.timeout)
            sock.connect(os.path.join(self.runtime_directory, SOCKET))
            try:
                call(sock, f"{INTERFACE}.Execute", {"command": list(command)})
            except VarlinkError as error:
                raise ServiceError(f"was not upgraded: {error}", self.stderr) from error
            except OSError:  # the old version is gone, and answers no more
                status = self._until(lambda status: status.generation > before.generation)
        if status is None:
            raise ServiceError("did not become ready", self.stderr)
        return status

    def _over(self) -> None:
        """A live upgrade has ended."""
        self._control_pid = 0

    def kill(self) -> None:
        """SIGKILL, as in a crash; what is drained beside it ends, too."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
        self._end_replaced()
        self._notify.settle()

    def _until(self, reached: Callable[[Status], bool]) -> Status | None:
        """Wait until a status of the instance is wanted; None if it ends, or is not in time."""
        deadline = time.monotonic() + self.timeout
        with self._notify.news:
            while time.monotonic() < deadline:
                status = self.status
                if status and reached(status):
                    return status
                if self.process is None or self.process.poll() is not None:
                    break
                self._notify.news.wait(0.02)  # short, to see a process that ends at once
        return None

    @property
    def stderr(self) -> str:
        """What the newest process wrote to stderr."""
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    def close(self) -> None:
        """End everything, what the program has started as well, and forget what is stored."""
        if self._live:
            self._live._close()
        self.kill()
        end_processes_with(f"RUNTIME_DIRECTORY={self.runtime_directory}")
        self._bus.close()
        self._notify.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # PID 1's part

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            **self.environment,
            "NOTIFY_SOCKET": str(self._notify.path),
            "RUNTIME_DIRECTORY": str(self.runtime_directory),
            BUS: str(Path(self._directory.name, "bus")),
            # Another one each time: a live upgrade is one even if nothing else has changed.
            "INVOCATION_ID": uuid.uuid4().hex,
        }
        environment.pop("SYSTEMD_EXEC_PID", None)
        return environment

    def _properties(self) -> Mapping[str, Typed]:
        """Of the unit, as far as the library asks."""
        usec = int(self.timeout * 1e6)
        program = self._command[0] if self._command else ""
        path = shutil.which(program) or program
        with self._notify.lock:
            main = self.process.pid if self.process else 0
            return {
                "Id": ("s", own_unit()),
                "ActiveState": ("s", "active"),
                "MainPID": ("u", main),
                "ControlPID": ("u", self._control_pid),
                "ControlGroup": ("s", _control_group()),
                "Result": ("s", "success"),
                "Restart": ("s", "always"),
                "NotifyAccess": ("s", "exec"),
                "KillMode": ("s", "control-group"),
                "KillSignal": ("i", signal.SIGTERM),
                "RestartKillSignal": ("i", signal.SIGTERM),
                "Type": ("s", "notify"),
                "OOMPolicy": ("s", "continue"),
                "User": ("s", str(os.geteuid())),
                "Group": ("s", str(os.getegid())),
                "UID": ("u", os.geteuid()),
                "GID": ("u", os.getegid()),
                "RuntimeDirectory": ("as", [self.runtime_directory.name]),
                "NFileDescriptorStore": ("u", len(self.store)),
                "FileDescriptorStoreMax": ("u", 1 << 16),
                "TimeoutStartUSec": ("t", usec),
                "TimeoutStopUSec": ("t", usec),
                "ExecStartEx": (_COMMANDS, [_command(path, self._command)]),
                "ExecReloadEx": (_COMMANDS, [_command("", ["-m", "upgrader.takeover"])]),
            }

    def _end_replaced(self) -> None:
        """What is drained beside an ending main process is told to end, and then has to."""
        for process in self._replaced:
            process.send_signal(signal.SIGTERM)
        for process in self._replaced:
            try:
                process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        self._replaced.clear()

    def _hear(self, fields: Mapping[str, str]) -> None:
        """Note what a process has told, besides what it stores."""
        self.status_text = fields.get("STATUS", self.status_text)
        if fields.get("READY") == "1":
            self._ready = True
        if FACTS in fields:
            self._facts = from_json(fields[FACTS])
        if fields.get("MAINPID", "").isdecimal():
            self._name_main(int(fields["MAINPID"]))

    def _name_main(self, pid: int) -> None:
        before = self.process
        if before is None or before.pid == pid:
            return
        try:
            self.process = AdoptedProcess(pid)
        except OSError:  # it has ended: PID 1 says nothing, either
            return
        self._replaced.append(before)

    def _require_parked(self) -> None:
        """Raise ServiceError unless the process before has parked all its states."""
        parked = {
            int(name.item): (text, fd, name.what)
            for text, fd in self.store
            if (name := StoreName.parse(text)) and name.what in (Stored.CHANNEL, Stored.IMAGE)
        }
        if not parked:
            raise ServiceError("has parked nothing", self.stderr)
        text, fd, what = parked[max(parked)]
        if what is Stored.IMAGE:
            manifest = unseal(fd)
        else:
            channel = ParkedChannel(fd.duplicate().socket(), text)
            channel.open()
            manifest = unseal(channel.image)
            channel.close()
        if manifest.unsaved:
            why = [str(item.why) for item in manifest.left_behind if item.what == "state"]
            raise ServiceError(
                f"could not save {', '.join(manifest.unsaved)}: {'; '.join(why)}", self.stderr
            )


def migrate(*versions: Sequence[str], environment: Mapping[str, str] | None = None) -> list[Status]:
    """Start the first version and restart into each of the others; returns what each one said.

    Raises ServiceError, with stderr, for the version that does not load what the one before saved.
    """
    with Service(environment=environment) as service:
        statuses = [service.start(versions[0])]
        statuses += [service.upgrade(version) for version in versions[1:]]
        service.stop()
        return statuses


def _command(path: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """A command line as D-Bus has it, with words that mean themselves."""
    return path, list(arguments), ["no-env-expand"], 0, 0, 0, 0, 0, 0, 0


def _control_group() -> str:
    """The cgroup of this process, which those under test are in as well."""
    with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
        for line in file:
            hierarchy, _, rest = line.rstrip("\n").partition(":")
            controllers, _, path = rest.partition(":")
            if hierarchy == "0" or controllers == "name=systemd":
                return path
    return ""
