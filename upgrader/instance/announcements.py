# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the next reload or restart of an instance is, as far as somebody has said beforehand."""

import time
import uuid

_PREFLIGHT = 10.0  # seconds in which the reload must begin that is to be a preflight
_RESTART = 60.0  # seconds in which a restart must come that was announced


class Announcements:
    """Nothing at first; set and asked from any thread."""

    def __init__(self) -> None:
        self.expected = ""  #: the id of the upgrade that the next reload is
        self._preflight_until = 0.0  # of `time.monotonic`
        self._restart_until = 0.0

    def upgrade(self, upgrade: str = "") -> str:
        """The next reload is an upgrade; returns its id, a new one if it has none."""
        self.expected, self._preflight_until = upgrade or uuid.uuid4().hex, 0.0
        return self.expected

    def preflight(self, upgrade: str) -> None:
        """The next reload is a preflight, if it comes soon."""
        self.upgrade(upgrade)
        self._preflight_until = time.monotonic() + _PREFLIGHT

    def take_back(self, upgrade: str) -> None:
        """No reload comes for this id."""
        if self.expected == upgrade:
            self.expected, self._preflight_until = "", 0.0

    def begin(self) -> tuple[str, bool]:
        """The reload has come: the id of the upgrade, a new one if nobody has said it, and whether it is a
        preflight. Nothing is announced any more."""
        begun = self.expected or uuid.uuid4().hex, self.preflight_due
        self.expected, self._preflight_until = "", 0.0
        return begun

    def restart(self) -> None:
        """A restart is about to come."""
        self._restart_until = time.monotonic() + _RESTART

    @property
    def preflight_due(self) -> bool:
        """Whether the next reload is a preflight."""
        return time.monotonic() < self._preflight_until

    @property
    def restart_due(self) -> bool:
        """Whether a restart is about to come."""
        return time.monotonic() < self._restart_until
