# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run a program inside a private systemd, in a cgroup of its own, with signals that reach it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# The shell puts itself in the cgroup before anything is forked, so that nothing escapes it.
_ENTER = 'echo 0 >"$0" && exec "$@"'

# A killed process is gone in microseconds; a fork bomb is not, and then cgroup.kill ends it.
_REAP_TIMEOUT = 5.0

Stream = int | IO[Any] | None


class InsideCommand(subprocess.Popen[str]):
    """A `subprocess.Popen` (text mode) of a program inside.

    Signals go to the program, not to the process that entered the namespaces for it. `kill` also
    ends everything that the program started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cgroup: Path,
        *,
        environment: Mapping[str, str],
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> None:
        self._cgroup = cgroup
        super().__init__(
            ["/bin/sh", "-c", _ENTER, str(cgroup / "cgroup.procs"), *argv],
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
        )

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the program itself."""
        if self.poll() is None:
            # Without a PID namespace to enter, nobody forks: the program is this process.
            for pid in self._entered() or [self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)

    def kill(self) -> None:
        """Kill the program and everything that it started; return at once."""
        # The process that entered has to outlive them and to reap them: as an orphan, what it
        # started would go to some process outside, and the PID namespace could not end.
        if self.poll() is None and self._entered():
            self.resume()
            for pid in self._members() - {self.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(_REAP_TIMEOUT)
        with contextlib.suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")

    def resume(self) -> None:
        """Let the entering process go on after it was stopped together with the program."""
        if self.poll() is None:
            super().send_signal(signal.SIGCONT)

    def _entered(self) -> list[int]:
        """Return the PID of the program, which the entering process forks into the PID namespace; None until it has."""
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as listing:
                return [int(pid) for pid in listing.read().split()]
        except OSError:
            return []

    def _members(self) -> set[int]:
        try:
            return {int(pid) for pid in (self._cgroup / "cgroup.procs").read_text().split()}
        except OSError:
            return set()
