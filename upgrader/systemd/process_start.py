# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a process was started: by that a caller knows whether an instance came after its wish."""

import os
import time


def process_started(pid: int) -> float:
    """When a process was started, in seconds of CLOCK_BOOTTIME, to the clock tick before.

    proc_pid_stat(5); raises OSError for a process that is not there.
    """
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def process_age(pid: int) -> float:
    """Seconds since a process was started; raises as `process_started`."""
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - process_started(pid), 0.0)
