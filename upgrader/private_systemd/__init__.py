# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real systemd, booted as PID 1 in namespaces over a throw-away root: for tests, demos and rehearsals, not for services."""

from upgrader.private_systemd.command import Command
from upgrader.private_systemd.errors import (
    BootError,
    CommandError,
    PrivateSystemdError,
    TreeError,
)
from upgrader.private_systemd.machine import PrivateSystemd

__all__ = [
    "BootError",
    "Command",
    "CommandError",
    "PrivateSystemd",
    "PrivateSystemdError",
    "TreeError",
]
