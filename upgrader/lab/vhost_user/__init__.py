# SPDX-License-Identifier: LGPL-2.1-or-later
"""An example of a kind with several FDs: a disk of a storage daemon, by vhost-user."""

from upgrader.lab.vhost_user.disk import VhostUserDisk
from upgrader.lab.vhost_user.messages import DaemonError, DaemonGone
from upgrader.lab.vhost_user.split_ring import LARGEST, SLOTS, Answered, Operation, RingError

__all__ = [
    "LARGEST",
    "SLOTS",
    "Answered",
    "DaemonError",
    "DaemonGone",
    "Operation",
    "RingError",
    "VhostUserDisk",
]
