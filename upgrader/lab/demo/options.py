# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the options of a demonstration."""

import resource
from dataclasses import dataclass

from upgrader.errors import UpgradeError
from upgrader.protocol.parameters import Mode

#: Besides the connections it holds, the load client needs FDs for all others that wait at one time.
FDS_OF_LOAD = 2000


class DemoError(UpgradeError):
    """The demonstration could not be run; this says nothing about upgrades."""


class OptionError(DemoError):
    """An option has an impossible value; `option` names it as on the command line."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One demonstration: how to upgrade, how often, with how many streams and idle connections.

    `systemd` is "host", a Debian suite or the path of a root tree; `user` runs the service
    unprivileged. Raises OptionError.
    """

    mode: Mode = Mode.LIVE
    upgrades: int = 10
    streams: int = 8
    connections: int = 0
    systemd: str = "host"
    user: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in list(Mode):
            raise OptionError("--mode", f"{self.mode!r} is none of {', '.join(Mode)}")
        object.__setattr__(self, "mode", Mode(self.mode))
        if self.upgrades < 1:
            raise OptionError("--upgrades", f"{self.upgrades} is not at least one upgrade")
        if self.streams < 0:
            raise OptionError("--streams", f"{self.streams} is less than none")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = hard - FDS_OF_LOAD - self.streams
        if not 0 <= self.connections <= most:
            limit = f"RLIMIT_NOFILE of {hard} leaves room for 0 to {most} of them"
            raise OptionError("--connections", f"{self.connections} cannot be held: {limit}")
