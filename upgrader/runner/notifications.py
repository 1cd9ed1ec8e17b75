# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the program tells of itself: the notify socket that it is given in place of PID 1's.

A file, as PID 1's: some programs know nothing of abstract names (the gem sd_notify of Puma). A program that
has dropped its privileges must reach it as well, so it is abstract where other users reach no file. In
either case anybody can send, and a message counts only if its sender is the program or below it. sd_notify(3).
"""

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from upgrader.runner.processes import parent
from upgrader.systemd.notifications import notify_socket, take

_PREFIX = "upgrader-run"
_LONGEST = 60  # bytes of a directory: a path has 108 at most, unix(7)
_ONCE = 64  # messages taken without a look at anything else: anybody can send any number
_DEEPEST = 64  # generations of processes between a sender and the program
#: What PID 1 is told as well, of the program that serves.
RELAYED = ("STATUS", "WATCHDOG", "ERRNO", "EXTEND_TIMEOUT_USEC")

_log = logging.getLogger("upgrader")


class Notifications:
    """The socket. `on_message` gets the fields of each message of the program."""

    def __init__(
        self, on_message: Callable[[Mapping[str, str]], None], directory: Path | None = None
    ) -> None:
        """In a directory, if that is for everybody; raises OSError."""
        self.program = 0  #: its PID; before it is known, nobody is listened to
        self._on_message = on_message
        if directory and not _is_reached_by_all(directory):
            directory = None
        self._directory = directory
        self.remove_dead()
        self._further: list[Path] = []
        #: for NOTIFY_SOCKET=
        self._sock, self.address = notify_socket(_PREFIX, directory)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        """Readable if there is something to `receive`."""
        return self._sock.fileno()

    def receive(self) -> None:
        """Take what has come: a sender blocks if nobody does. Whoever waits for BARRIER=1 waits for
        its FD to be closed, which it is."""
        for _ in range(_ONCE):
            try:
                said = take(self._sock)
            except OSError:
                return
            if said is None:
                return
            if self._is_programs(said.sender):
                self._on_message(dict(field.partition("=")[::2] for field in said.fields))
            else:
                _log.debug("a notification of process %d, not of the program", said.sender)
            for fd in said.fds:
                fd.close()

    def name_for(self, pid: int) -> str:
        """The address for a program, by which later runners find it as well."""
        if self._directory:
            place = _place(self._directory, pid)
            os.rename(self.address, place)
            self.address = str(place)
        return self.address

    def stand_in_for(self, pid: int) -> None:
        """Be where a program sends to whose runner is gone: some fail where nobody is, in the middle of their
        drain. What it says is not heard."""
        if self._directory:
            place = _place(self._directory, pid)
            if place.exists():
                return
            with contextlib.suppress(OSError):
                os.link(self.address, place)
                self._further.append(place)

    def forget(self, pid: int) -> None:
        """Stand in for it no more: it has ended."""
        if self._directory and (place := _place(self._directory, pid)) in self._further:
            self._further.remove(place)
            place.unlink(missing_ok=True)

    def remove_dead(self) -> None:
        """Remove the files of runners that were killed."""
        for path in self._directory.glob(f"{_PREFIX}-*") if self._directory else ():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                try:
                    sock.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)
                except OSError:
                    continue

    def withdraw(self) -> None:
        """Leave no file behind, however this process ends: no program is started any more."""
        if self._directory:
            for place in (Path(self.address), *self._further):
                place.unlink(missing_ok=True)

    def close(self) -> None:
        """Listen no more."""
        self._sock.close()
        self.withdraw()

    def _is_programs(self, pid: int) -> bool:
        """Whether a process is the program, below it, or was: an orphan is this process's child."""
        for _ in range(_DEEPEST):
            if pid == self.program != 0:
                return True
            above = parent(pid)
            if above == os.getpid():
                return self.program != 0
            if above <= 1:
                return False
            pid = above
        return False


def _place(directory: Path, pid: int) -> Path:
    return directory / f"{_PREFIX}-{pid}"


def relayed(fields: Mapping[str, str]) -> Sequence[str]:
    """What of a message is for PID 1."""
    return [f"{name}={fields[name]}" for name in RELAYED if name in fields]


def _is_reached_by_all(directory: Path) -> bool:
    """Whether every user finds a file in it."""
    if len(os.fsencode(directory)) > _LONGEST:
        return False
    with contextlib.suppress(OSError):
        return all(each.stat().st_mode & stat.S_IXOTH for each in (directory, *directory.parents))
    return False
