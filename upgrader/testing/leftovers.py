# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service under test has started and left running, such as the workers of a pool: it ends with the
service, as PID 1 ends what is in the cgroup of a unit."""

import contextlib
import os
import signal
import subprocess
import time

from upgrader.testing.process import AdoptedProcess

_PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL


def end_processes_with(variable: str) -> None:
    """End all processes that have been started with this variable (`NAME=value`) in their environment:
    by SIGTERM, and by SIGKILL what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        found = _processes_with(variable.encode())
        for process in found:
            process.send_signal(number)
        deadline = time.monotonic() + _PATIENCE
        for process in found:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def _processes_with(variable: bytes) -> list[AdoptedProcess]:
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # It may end meanwhile, or be another user's.
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if variable in file.read().split(b"\0"):
                found.append(AdoptedProcess(int(name)))
    return found
