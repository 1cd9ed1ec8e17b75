# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 has given to this process at its start: for takeover, which must give it to the next.

It is also how takeover sees that a setting of the unit has changed, which no file of the program
shows.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from upgrader.description import Started
from upgrader.errors import BusError
from upgrader.systemd.bus import Bus

_BUS = 5.0
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def settings(bus: Bus, unit: str) -> str:
    """All settings of the unit that only a new process gets, as PID 1 has them, in one checksum.

    They are what PID 1 itself calls constant: whatever changes at run time is left out.
    """
    return f"{zlib.crc32(repr(sorted(bus.constants(unit).items())).encode()):08x}"


def ask_settings(unit: str) -> str:
    """Those settings; empty if PID 1 does not say."""
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        return settings(bus, unit)
    return ""


def describe(activated: Sequence[str], settings: str) -> Started:
    """For the answer to Describe."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(os.environ.get("CREDENTIALS_DIRECTORY") or os.devnull))
    return Started(list(activated), names, _memory(), settings)


def _memory() -> int:
    """Bytes that belong to this process alone: so much more will its successor need."""
    with contextlib.suppress(OSError):
        if match := _ANONYMOUS.search(Path("/proc/self/status").read_text(encoding="ascii")):
            return int(match[1]) * 1024
    return 0
