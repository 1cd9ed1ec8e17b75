# SPDX-License-Identifier: LGPL-2.1-or-later
"""Duplicate an FD of another process, for whoever may trace it, such as root; it keeps its own."""

import ctypes
import os

from upgrader.protocol.fd import Fd

_PIDFD_GETFD = 438  # pidfd_getfd(2), Linux 5.6; the same number on all architectures


def duplicate(pid: int, number: int) -> Fd:
    """FD `number` of a process; raises OSError, and PermissionError if that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Fd(os.pidfd_open(pid)) as process:
        taken = libc.syscall(_PIDFD_GETFD, process.fileno(), number, 0)
    if taken < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return Fd(taken)
