# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 has given to this process at its start: for takeover, which must give it to the next.

It is also how takeover sees that a setting of the unit has changed, which no file of the program
shows.
"""

import contextlib
import re
from collections.abc import Sequence

from upgrader.errors import BusError
from upgrader.protocol.varlink_types import Started
from upgrader.systemd.bus import Bus
from upgrader.systemd.unit_settings import Settings, settings

_BUS = 5.0
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def ask_settings(unit: str) -> Settings:
    """Those settings, as far as PID 1 says."""
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        return settings(bus, unit)
    return Settings()


def describe(activated: Sequence[str], known: Settings | None) -> Started:
    """For the answer to Describe; `known`: as far as PID 1 was asked."""
    settings = known or Settings()
    return Started(list(activated), list(settings.credentials), _memory(), settings.checksum)


def _memory() -> int:
    """Bytes that belong to this process alone: so much more will its successor need."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        if match := _ANONYMOUS.search(file.read()):
            return int(match[1]) * 1024
    return 0
