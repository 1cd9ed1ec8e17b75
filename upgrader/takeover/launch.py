# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts a new main process for takeover: as PID 1 would start it, and held back until released."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal

from upgrader.codes import Code
from upgrader.protocol.fd import Fd
from upgrader.protocol.takeover_line import Said, Word, encode
from upgrader.systemd import precedence

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from upgrader.systemd.main_command import MainCommand

_OOM = "/proc/self/oom_score_adj"


class NewProcess:
    """A process twice removed, so that it is PID 1's own from the beginning; it waits for
    `release`, and ends if this process ends before that."""

    def __init__(self, line: socket.socket, make: Callable[[int, int, int], MainCommand]) -> None:
        """`line` is its end of the line to takeover. `make` is called in it, with its PID, the FD of
        the line and the oom_score_adj of the unit, for what to execute. Raises OSError."""
        gate, release = os.pipe2(os.O_CLOEXEC)
        told, tell = os.pipe2(os.O_CLOEXEC)
        if (between := os.fork()) == 0:
            try:
                if os.fork() == 0:
                    os.close(release)
                    _become(line, make, gate, tell)
            finally:  # whatever fails here: this is a copy
                os._exit(0)
        self._release = Fd(release)
        os.waitpid(between, 0)
        os.close(gate)
        os.close(tell)
        line.close()
        with Fd(told) as end:
            number = os.read(end.fileno(), 16)
        if not number:
            self._release.close()
            raise OSError(errno.EAGAIN, "a new process cannot be made")
        self.pid = int(number)
        self._pidfd = Fd(os.pidfd_open(self.pid))

    def release(self) -> None:
        """Have it execute the program; raises OSError."""
        os.write(self._release.fileno(), b"\n")

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._pidfd.fileno()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return bool(select.select([self], [], [], 0)[0])

    def kill(self) -> None:
        """Make sure that it ends."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fileno(), signal.SIGKILL)

    def close(self) -> None:
        """Give up what holds it, which ends it unless it was released."""
        self._release.close()
        self._pidfd.close()


def _become(
    line: socket.socket, make: Callable[[int, int, int], MainCommand], gate: int, tell: int
) -> None:
    path = ""
    try:
        # What takeover has changed for itself, and Python for all.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.setsid()
        pid = os.getpid()
        precedence.give_way()  # before anybody knows of it, who may take that back
        os.write(tell, str(pid).encode())
        if not os.read(gate, 1):
            return  # takeover has died
        line.set_inheritable(True)
        with open(_OOM, encoding="ascii") as file:
            command = make(pid, line.fileno(), int(file.read()))
        path = command.path
        # Should memory run out in the overlap, the one that does not serve yet goes first.
        with open(_OOM, "w", encoding="ascii") as file:
            file.write("1000")
        os.execve(path, [*command.arguments], dict(command.environment))
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        line.send(encode(Word(Said.FAILED, Code.ENDED_EARLY, f"{path}: {why}")))
    finally:
        os._exit(1)
