# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot a real systemd as PID 1 in namespaces, over a root that is thrown away: for tests and demos."""

from upgrader.lab.private_systemd.command import InsideCommand
from upgrader.lab.private_systemd.errors import (
    BootError,
    CommandError,
    PrivateSystemdError,
    TreeError,
)
from upgrader.lab.private_systemd.machine import PrivateSystemd

__all__ = [
    "BootError",
    "CommandError",
    "InsideCommand",
    "PrivateSystemd",
    "PrivateSystemdError",
    "TreeError",
]
