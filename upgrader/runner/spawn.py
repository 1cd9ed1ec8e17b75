# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a process as PID 1 would: in a session of its own, held back until it is released.

Held back, because nothing may run that nobody would find after a crash: what must be noted of it is
noted first.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upgrader.errors import VerifyError
from upgrader.runner.processes import RunningProcess
from upgrader.runner.waiting_process import WaitingProcess
from upgrader.systemd.listen_fds import FIRST

if TYPE_CHECKING:
    from upgrader.protocol.identity import HasFileno

_AT_ONCE = 250  # FDs in one message: SCM_MAX_FD is 253
_PATIENCE = 30.0  # seconds for an interpreter to start
#: Below it in `/proc/self/fd/N` there are listeners; see `credentials`.
_CREDENTIALS = "CREDENTIALS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class StartOrder:
    """What a process shall become: its words, its environment, and its FDs from 3 on.

    `own_pid`: variables that hold its own PID; `limits`: soft limits to be set back, by number.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    fds: Sequence[HasFileno] = ()
    own_pid: Sequence[str] = ()
    limits: Mapping[int, tuple[int, int]] | None = None
    ignores_sigpipe: bool = True


class Held:
    """A process that is held back, and ends if this one ends before it is released."""

    def __init__(self, order: StartOrder, waiting: WaitingProcess | None = None) -> None:
        """`waiting`: the process, which nobody else has; raises OSError if none can be made."""
        waiting = waiting or WaitingProcess()
        self._order = order
        self._line = waiting.line
        self.process = RunningProcess(waiting.pidfd)
        numbers = [fd.fileno() for fd in order.fds]
        credentials = _inherited(order.environment)
        numbers += [] if credentials is None else [credentials]
        for first in range(0, len(numbers), _AT_ONCE):
            socket.send_fds(self._line, [b" "], numbers[first : first + _AT_ONCE])

    def release(self) -> None:
        """Have it become the program; raises VerifyError if that cannot be done."""
        order = self._order
        environment = dict(order.environment)
        if _inherited(environment) is not None:
            environment[_CREDENTIALS] = f"/proc/self/fd/{FIRST + len(order.fds)}"
        default = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        if order.ignores_sigpipe:  # as Python does
            default -= {signal.SIGPIPE}
        text = json.dumps(
            {
                "arguments": [*order.arguments],
                "environment": environment,
                "own_pid": [*order.own_pid],
                "limits": [*(order.limits or {}).items()],
                "default": sorted(map(int, default)),
                "first": FIRST,
            }
        )
        try:
            self._line.settimeout(_PATIENCE)
            self._line.sendall(text.encode(errors="surrogateescape") + b"\n")
            why = b"".join(iter(lambda: self._line.recv(4096), b""))
        except OSError as error:
            raise VerifyError(f"{order.arguments[0]} cannot be started: {error}") from error
        finally:
            self.close()
        if why:
            raise VerifyError(why.decode(errors="replace"))

    def close(self) -> None:
        """Give it up: it ends, unless it was released."""
        self._line.close()


def find_program(word: str) -> str:
    """The path of what a command line names by its first word, empty if there is none; as execvp(3). The
    module shutil would import what takes longer than that."""
    for place in [""] if os.path.dirname(word) else os.get_exec_path():
        path = os.path.join(place, word)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return ""


def soft_limits() -> dict[int, tuple[int, int]]:
    """The limits that a library may raise for this process."""
    return {resource.RLIMIT_NOFILE: resource.getrlimit(resource.RLIMIT_NOFILE)}


def _inherited(environment: Mapping[str, str]) -> int | None:
    """The FD of the credentials, where takeover could give no path of them."""
    place = environment.get(_CREDENTIALS, "")
    with contextlib.suppress(ValueError):
        if place.startswith("/proc/self/fd/"):
            return int(place.removeprefix("/proc/self/fd/"))
    return None
