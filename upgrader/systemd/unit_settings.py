# SPDX-License-Identifier: LGPL-2.1-or-later
"""The settings of a unit that only a new process gets: whether they have changed, no file shows."""

from __future__ import annotations

import binascii

from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.systemd.bus import Bus


class Settings(Value):
    """The settings of a unit that only a new process gets, in one checksum (empty if PID 1 does not
    say), and the names of its credentials."""

    checksum: str = ""
    credentials: tuple[str, ...] = ()


def settings(bus: Bus, unit: str) -> Settings:
    """What PID 1 calls constant of a unit: all that changes at run time is left out."""
    from upgrader.systemd.unit import credential_names  # too much for a start

    constants = bus.constants(unit)
    checksum = f"{binascii.crc32(repr(sorted(constants.items())).encode()):08x}"
    return Settings(checksum, credential_names(constants))
