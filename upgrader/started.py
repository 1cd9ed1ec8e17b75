# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 has given to this process at its start: for takeover, which must give it to the next.

It is also how takeover sees that a setting of the unit has changed, which no file of the program
shows.
"""

import contextlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upgrader.description import Started
from upgrader.errors import BusError
from upgrader.systemd.bus import Bus
from upgrader.systemd.unit import credential_names

_BUS = 5.0
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a unit that only a new process gets, in one checksum (empty if PID 1 does not
    say), and the names of its credentials."""

    checksum: str = ""
    credentials: tuple[str, ...] = ()


def settings(bus: Bus, unit: str) -> Settings:
    """What PID 1 calls constant of a unit: all that changes at run time is left out."""
    constants = bus.constants(unit)
    checksum = f"{zlib.crc32(repr(sorted(constants.items())).encode()):08x}"
    return Settings(checksum, credential_names(constants))


def ask_settings(unit: str) -> Settings:
    """Those settings, as far as PID 1 says."""
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        return settings(bus, unit)
    return Settings()


def describe(activated: Sequence[str], settings: Settings) -> Started:
    """For the answer to Describe."""
    return Started(list(activated), list(settings.credentials), _memory(), settings.checksum)


def _memory() -> int:
    """Bytes that belong to this process alone: so much more will its successor need."""
    with contextlib.suppress(OSError):
        if match := _ANONYMOUS.search(Path("/proc/self/status").read_text(encoding="ascii")):
            return int(match[1]) * 1024
    return 0
