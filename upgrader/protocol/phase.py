# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a migration has come, and how it was decided; on the wire."""

from enum import StrEnum


class Phase(StrEnum):
    """How far a migration has come."""

    NONE = "none"  #: there was none yet
    SETUP = "setup"  #: the new version starts and prepares; nothing is disturbed
    COLLECTING = "collecting"  #: connections come to their safe points
    FROZEN = "frozen"  #: the image is made
    LOADING = "loading"  #: the destination loads it
    COMMITTED = "committed"  #: the destination owns everything
    DONE = "done"
    FAILED = "failed"  #: the source serves on
    CANCELLED = "cancelled"  #: likewise, because somebody wanted it
    #: likewise: it was a preflight, and the new version would have taken over. A tool of interface 1
    #: knows it by this word only.
    PREFLIGHT = "rehearsed"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens."""
        return self in _ENDED


_ENDED = frozenset((Phase.NONE, Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.PREFLIGHT))


class Decision(StrEnum):
    """Who owns the backends after an upgrade, as one side of it knows."""

    NONE = "none"  #: not decided yet, or there was no upgrade
    ABORTED = "aborted"  #: the source serves on
    COMMITTED = "committed"  #: the destination owns everything
