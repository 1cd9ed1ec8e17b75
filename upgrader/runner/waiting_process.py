# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that becomes another one, once it is told which.

It takes a while until its interpreter can hear that, so a runner has one started before anything else. Imports
little for that reason.
"""

import os
import socket
import subprocess
import sys

from upgrader.protocol.fd import Fd

_LAUNCH = os.path.join(os.path.dirname(__file__), "launch.py")


class WaitingProcess:
    """One of them, in a session of its own; it ends if this process does, or closes its line."""

    def __init__(self) -> None:
        """Raises OSError if none can be made."""
        self.line, theirs = socket.socketpair()
        with theirs:
            # Not posix_spawn(3), which has two signals of the C library ignored in whatever it starts.
            started = subprocess.Popen(
                [sys.executable, "-I", "-S", _LAUNCH, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        started.returncode = 0  # its end is not for Popen to see
        self.pid = started.pid
        self.pidfd = Fd(os.pidfd_open(started.pid))
