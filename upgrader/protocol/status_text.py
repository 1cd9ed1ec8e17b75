# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an instance came to be, in one line for people: STATUS=, and what the tool prints.

Nothing here reads it back: any program may send STATUS=.
"""

from __future__ import annotations

from enum import StrEnum

from upgrader.protocol.later import later
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    import json

    from upgrader.protocol import wording
else:
    json = later("json")
    wording = later("upgrader.protocol.wording")

#: The variable in which `upgrader.testing` gets a `Status` with READY=1, as JSON; sd_notify(3) leaves
#: X_ to services.
FACTS = "X_UPGRADER"


class Origin(StrEnum):
    """Where an instance got its backends and state from."""

    COLD = "cold"  #: Nowhere: it began anew.
    RESTART = "restart"  #: An image that the instance before had parked.
    LIVE = "live"  #: The instance before, which ran beside it.
    EXEC = "exec"  #: The process before, which is this one.
    INSURANCE = "insurance"  #: What was parked in case the instance before dies early.
    UNKNOWN = "unknown"  #: An instance of an older library does not say.


class Status(Value):
    """Generation and origin of a serving instance.

    `fds` and `state_bytes` (size of the image) came from `source_generation`; `left_behind` counts
    what could not cross; `set_aside` is the generation of an image that was not loaded. For
    `pause` seconds nobody served. `dropped` are fields of states that this version does not know, and
    `unsaved` states that the source could not save, so that they began anew. `datagrams_lost` came
    in the pause and did not fit into the receive buffer. `refused` says why a newer version has not taken over. `library`
    is the version of the library where the origin is unknown.
    """

    generation: int
    origin: Origin
    source_generation: int | None = None
    fds: int = 0
    state_bytes: int = 0
    left_behind: int = 0
    set_aside: int | None = None
    pause: float | None = None
    refused: str = ""
    library: str = ""
    dropped: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()
    datagrams_lost: int = 0

    def __str__(self) -> str:
        moved = wording.counted(self.fds, "FD")
        moved += f", {wording.show_bytes(self.state_bytes)} of state"
        return self._line(moved, wording.show_duration(self.pause or 0))

    @property
    def status_text(self) -> str:
        """The same for STATUS= and the journal, in the form that a tool of version 0.1.0 reads back."""
        moved = f"{self.fds} FDs, {self.state_bytes} bytes of state"
        return self._line(moved, f"{(self.pause or 0) * 1000:.1f} ms")

    def _line(self, moved: str, pause: str) -> str:
        refused = f"{_REFUSED}{self.refused}" if self.refused else ""
        if self.origin is Origin.UNKNOWN:
            return f"generation {self.generation}, origin unknown (library {self.library}){refused}"
        if self.origin is Origin.COLD:
            aside = f", image of generation {self.set_aside} set aside" if self.set_aside else ""
            return f"generation {self.generation}, cold start{aside}{refused}"
        paused = "" if self.pause is None else f", paused {pause}"
        if self.dropped:
            count = len(self.dropped)
            paused += f", {count} field{'s' * (count > 1)} dropped"
        if self.unsaved:
            paused += f", without state {', '.join(self.unsaved)}"
        if self.datagrams_lost:
            paused += f", {self.datagrams_lost} datagrams lost"
        return (
            f"generation {self.generation}, loaded by {self.origin}"
            f" from generation {self.source_generation}: {moved},"
            f" {self.left_behind} left behind{paused}{refused}"
        )


def to_json(status: Status) -> str:
    """All of a status, for programs."""
    return json.dumps(vars(status))


def from_json(text: str) -> Status:
    """What `to_json` has written; raises ValueError."""
    status = Status(**json.loads(text))
    return status.replace(
        origin=Origin(status.origin), dropped=tuple(status.dropped), unsaved=tuple(status.unsaved)
    )


_REFUSED = "; upgrade failed: "
