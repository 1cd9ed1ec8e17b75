# SPDX-License-Identifier: LGPL-2.1-or-later
"""For authors: upgrade your own program from one version to the next, with no root and no systemd.

`Service` plays the part of PID 1 that a restart needs: NOTIFY_SOCKET with an FD store, LISTEN_FDS,
SIGTERM. It shows that a version loads what another one saved; only a real systemd shows the rest.
"""

import array
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from upgrader.errors import UpgradeError
from upgrader.protocol.channel import ParkedChannel
from upgrader.protocol.fd import Fd
from upgrader.protocol.image import unseal
from upgrader.protocol.state import SavedState, load, save
from upgrader.protocol.status_text import FACTS, Origin, Status
from upgrader.systemd.fdstore import Stored, StoreName

T = TypeVar("T")

__all__ = [
    "Origin",
    "Service",
    "ServiceError",
    "Status",
    "assert_readable",
    "migrate",
    "save_golden",
]

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


class ServiceError(UpgradeError):
    """The program did not become ready, or did not end; `stderr` is what it said."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(f"{message}:\n{stderr}" if stderr else message)
        self.stderr = stderr


class Service:
    """One service under test. What it stores outlives its processes, until `close`.

    `environment` is added to the caller's, and `timeout` is how many seconds a start and a stop may
    take; both may be changed at any time, and count from the next start or stop on.
    """

    def __init__(
        self, *, environment: Mapping[str, str] | None = None, timeout: float = 30.0
    ) -> None:
        self.store: list[tuple[str, Fd]] = []  #: The FD store: each FD and its name.
        self.status_text = ""  #: The last STATUS= of the program, for people.
        self._facts: Status | None = None
        self.process: subprocess.Popen[bytes] | None = None  #: The newest process, while it runs.
        self.timeout = timeout  #: Seconds for a start, and for a stop.
        self.environment = dict(environment or {})  #: What a start gets beside the caller's own.
        self._ready = threading.Event()
        self._directory = tempfile.TemporaryDirectory(prefix="upgrader-testing-")
        self._stderr = Path(self._directory.name, "stderr")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(Path(self._directory.name, "notify")))
        self._lock = threading.Lock()  # held while the store changes
        self._closing, self._closed = socket.socketpair()
        self._listener = threading.Thread(target=self._listen, name="notify")
        self._listener.start()

    @property
    def status(self) -> Status | None:
        """What the instance last said of itself with READY=1; None if it does not use upgrader."""
        return self._facts

    def start(self, command: Sequence[str]) -> Status:
        """Start a version and wait for READY=1; raises ServiceError with its stderr."""
        self._ready.clear()
        numbers = [str(fd.fileno()) for _, fd in self.store]
        environment = {
            **os.environ,
            **self.environment,
            "NOTIFY_SOCKET": str(Path(self._directory.name, "notify")),
        }
        environment.pop("SYSTEMD_EXEC_PID", None)
        if numbers:
            environment["LISTEN_FDS"] = str(len(numbers))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self.store)
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _EXEC, str(len(numbers)), *numbers, *command],
                env=environment,
                pass_fds=[fd.fileno() for _, fd in self.store],
                stderr=stderr,
            )
        if not self._wait_ready():
            self.kill()
            raise ServiceError("did not become ready", self.stderr)
        status = self.status
        if status is None:
            raise ServiceError(f"is no instance: status {self.status_text!r}", self.stderr)
        return status

    def stop(self) -> None:
        """SIGTERM, as in a restart: the instance parks. Raises ServiceError if it does not end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServiceError("did not end", self.stderr) from None
        self.process = None
        self._settle()
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
        not every state was parked, and if it has not loaded what was.
        """
        self.stop()
        self._require_parked()
        status = self.start(command)
        if status.origin is Origin.COLD:
            raise ServiceError(f"has not loaded what was parked: {status}", self.stderr)
        return status

    def kill(self) -> None:
        """SIGKILL, as in a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self._settle()

    @property
    def stderr(self) -> str:
        """What the newest process wrote to stderr."""
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    def close(self) -> None:
        """End everything and forget what is stored."""
        self.kill()
        self._closing.close()
        self._listener.join()
        self._closed.close()
        self._notify.close()
        for _, fd in self.store:
            fd.close()
        self.store.clear()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # PID 1's part

    def _wait_ready(self) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._ready.wait(0.02):  # short, to see a process that ends at once
                return True
        return self._ready.is_set()

    def _settle(self) -> None:
        """Wait until all that a process sent before its end has been handled."""
        reading, writing = os.pipe()
        with Fd(reading) as end:
            with Fd(writing), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(self._notify.getsockname())
                socket.send_fds(sock, [b"BARRIER=1"], [writing])
            os.read(end.fileno(), 1)

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._notify, select.POLLIN)
        poll.register(self._closed, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self._notify.fileno() in ready:
                with self._lock:
                    self._receive()
            elif ready:
                return

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(253 * 4)
        data, ancillary, _, _ = self._notify.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
        numbers = array.array("i")
        for _, _, part in ancillary:
            numbers.frombytes(part)
        fds = [Fd(number) for number in numbers]
        fields = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            self.store = [item for item in self.store if item[0] != name]
        elif fields.get("FDSTORE") == "1":
            self.store += [(name, fd) for fd in fds if not self._stored(fd)]
        self.status_text = fields.get("STATUS", self.status_text)
        if fields.get("READY") == "1":
            self._facts = None
            if FACTS in fields:
                self._facts = msgspec.json.decode(fields[FACTS], type=Status)
            self._ready.set()

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

    def _stored(self, fd: Fd) -> bool:
        same = os.fstat(fd.fileno())
        return any(os.path.samestat(same, os.fstat(known.fileno())) for _, known in self.store)


def migrate(*versions: Sequence[str], environment: Mapping[str, str] | None = None) -> list[Status]:
    """Start the first version and restart into each of the others; returns what each one said.

    Raises ServiceError, with stderr, for the version that does not load what the one before saved.
    """
    with Service(environment=environment) as service:
        statuses = [service.start(versions[0])]
        statuses += [service.upgrade(version) for version in versions[1:]]
        service.stop()
        return statuses


def save_golden(value: object, path: Path) -> None:
    """Write a state to a file, to be kept in your repository for `assert_readable`."""
    path.write_bytes(msgspec.msgpack.encode(save(value)))


def assert_readable(cls: type[T], path: Path) -> T:
    """Load a state that an earlier version wrote with `save_golden`; raises as an upgrade would."""
    saved = msgspec.msgpack.decode(path.read_bytes(), type=SavedState)
    return load(cls, saved)[0]
