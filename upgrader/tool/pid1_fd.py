# SPDX-License-Identifier: LGPL-2.1-or-later
"""Duplicate an FD that PID 1 holds, for root to look at; PID 1 keeps its own."""

import os
import re

from upgrader.protocol.fd import Fd
from upgrader.tool import process_fd


def duplicate(inode: int) -> Fd:
    """The FD of PID 1 with this inode; raises PermissionError, FileNotFoundError or OSError."""
    numbers = [number for number in os.listdir("/proc/1/fd") if _inode(number) == inode]
    if not numbers:
        raise FileNotFoundError(f"PID 1 has no FD of inode {inode}")
    return process_fd.duplicate(1, int(numbers[0]))


def _inode(number: str) -> int:
    try:
        target = os.readlink(f"/proc/1/fd/{number}")
        match = re.fullmatch(r"socket:\[(\d+)\]", target)
        return int(match[1]) if match else os.stat(f"/proc/1/fd/{number}").st_ino
    except FileNotFoundError:
        return 0
