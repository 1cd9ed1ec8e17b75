# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner tells of its programs to whoever asks its instance: processes, version, memory, clients.

Asked from the thread of the instance's socket, so all is kept in values that are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from upgrader.errors import VerifyError
from upgrader.protocol.later import later
from upgrader.runner.adapter import ProgramAdapter
from upgrader.runner.connections import count
from upgrader.runner.host import Host
from upgrader.runner.processes import RunningProcess, members
from upgrader.systemd.cgroup import directory

if TYPE_CHECKING:
    from upgrader.protocol import varlink_types
else:
    varlink_types = later("upgrader.protocol.varlink_types")

_VERSION = re.compile(r"\d+(?:\.\d+)+[\w.+~:-]*")
_LONGEST = 64  # characters of a version
_OUTPUT = 4096  # bytes of what a command says that are read
_DELETED = " (deleted)"  # proc_pid_exe(5)


class ProgramReport:
    """That of one runner."""

    def __init__(self, host: Host, adapter: ProgramAdapter) -> None:
        self._host = host
        self._adapter = adapter
        self._pids: tuple[int, ...] = ()  # the one that serves, and those that are drained
        self._version = ""

    def begin(self, program: RunningProcess) -> None:
        """From now on, this program serves, and the others that PID 1 keeps are drained."""
        old = (each.pid for each in self._host.programs().values() if each.pid > 0)
        self._pids = (program.pid, *(pid for pid in old if pid != program.pid))
        report = self._host.instance._parts.report
        report.version = self._version
        report.programs = self.programs
        report.preflight_first = self._adapter.preflight_first
        report.connections_of = self.connections

    async def learn_version(self) -> None:
        """Run the command that tells the version of the program, if there is one; it decides nothing."""
        words = self._host.options.version_command
        if words:
            with contextlib.suppress(OSError, VerifyError):
                self._version = version_in(await self._host.output(words, _OUTPUT))

    def programs(self) -> list[varlink_types.RunProgram]:
        """All that live, the one that serves first."""
        here: Collection[int] = ()
        with contextlib.suppress(OSError):
            here = set(members(directory()))
        serving = self._pids[:1]
        return [
            varlink_types.RunProgram(
                pid,
                replaced=(pid,) != serving,
                processes=len(tree := _tree(pid)),
                memory=sum(map(_memory, tree)),
                offers=[*self._adapter.offers] if (pid,) == serving else [],
                deleted=_deleted(pid),
                sockets=[*self._adapter.sockets] if (pid,) == serving else [],
                may_end=self._adapter.may_end,
            )
            for pid in self._pids
            if pid in here
        ]

    def connections(self, name: str) -> int:
        """How many the listener of that name has, as long as this runner serves."""
        if not self._host.serves:
            return 0
        return sum(count(sock) for sock in self._host.sockets_of(name))


def version_in(text: str) -> str:
    """The version that a program tells: its first number with a dot in it, or else its first line."""
    if match := _VERSION.search(text):
        return match[0][:_LONGEST]
    return text.strip().partition("\n")[0][:_LONGEST]


def _deleted(pid: int) -> str:
    """The path of the file that a process runs, if it was replaced or removed since."""
    with contextlib.suppress(OSError):
        path = os.readlink(f"/proc/{pid}/exe")
        return path.removesuffix(_DELETED) if path.endswith(_DELETED) else ""
    return ""


def _tree(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [each.pid for each in RunningProcess.of(pid).tree()]
    return []


def _memory(pid: int) -> int:
    """Bytes that are its own, or its share of what it has in common with others, such as its parent:
    so much more does another program like it need. proc_pid_smaps(5)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    return 0
