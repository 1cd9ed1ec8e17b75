# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program started inside a private systemd: its own cgroup, signals that reach it; knows nothing of machines."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# The shell puts itself in the cgroup before anything is forked, so that nothing escapes it.
_ENTER = 'echo 0 >"$0" && exec "$@"'

Stream = int | IO[Any] | None


class Command(subprocess.Popen[str]):
    """A `subprocess.Popen` (text mode) of a program inside.

    Signals go to the program, not to the process that entered for it; `kill` ends all that the
    program started as well.
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
        if self.poll() is not None:
            return
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as listing:
                inner = [int(pid) for pid in listing.read().split()]
        except FileNotFoundError:
            return
        # Without a PID namespace to enter, nobody forks: the program is this process.
        for pid in inner or [self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    def kill(self) -> None:
        """Kill the program and all that it started."""
        with contextlib.suppress(FileNotFoundError):
            (self._cgroup / "cgroup.kill").write_text("1")
        super().send_signal(signal.SIGKILL)
