# SPDX-License-Identifier: LGPL-2.1-or-later
"""For authors: upgrade your own program from one version to the next, with no root and no systemd.

`Service` plays the part of PID 1: it starts and stops your program, keeps its FDs, answers what the
library asks, and runs the library's own takeover for live upgrades. What a unit file does to a
process only a real systemd shows.
"""

from upgrader.protocol.status_text import Origin, Status
from upgrader.testing.golden import assert_readable, save_golden
from upgrader.testing.live import LiveUpgrade, ServiceError
from upgrader.testing.service import Service, migrate

__all__ = [
    "LiveUpgrade",
    "Origin",
    "Service",
    "ServiceError",
    "Status",
    "assert_readable",
    "migrate",
    "save_golden",
]
