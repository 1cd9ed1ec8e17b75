# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kills the main process of a unit so many seconds after it began to park, if it still runs."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from upgrader.systemd.bus import Bus

unit, delay = sys.argv[1], float(sys.argv[2])
asked = ["systemctl", "show", "--value", "-p", "MainPID", unit]
pid = int(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)
with Bus(60) as bus:
    before = bus.stored_fds(unit)
    print("waiting", flush=True)
    while bus.stored_fds(unit) <= before:
        pass
until = time.monotonic() + delay
while time.monotonic() < until:
    pass
with contextlib.suppress(ProcessLookupError):  # it has parked everything, and has ended
    os.kill(pid, signal.SIGKILL)
