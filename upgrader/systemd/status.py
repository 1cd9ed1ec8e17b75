# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance says of itself in STATUS=, written and read in one place.

It reaches PID 1 in the same datagram as READY=1, so `StatusText` never lags behind the state.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class Origin(StrEnum):
    """Where an instance got its backends and state from."""

    COLD = "cold"
    RESTART = "restart"
    LIVE = "live"
    EXEC = "exec"  #: the process before, which is this one
    INSURANCE = "insurance"  #: what was parked in case the instance before dies early


@dataclass(frozen=True, slots=True)
class Status:
    """Generation and origin of a serving instance.

    `fds` and `state_bytes` (size of the image) came from `source_generation`; `left_behind` counts
    what could not cross; `set_aside` is the generation of an image that was not loaded. For
    `pause` seconds nobody served. `refused` says why a newer version has not taken over.
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

    def __str__(self) -> str:
        refused = f"{_REFUSED}{self.refused}" if self.refused else ""
        if self.origin is Origin.COLD:
            aside = f", image of generation {self.set_aside} set aside" if self.set_aside else ""
            return f"generation {self.generation}, cold start{aside}{refused}"
        paused = "" if self.pause is None else f", paused {self.pause * 1000:.1f} ms"
        return (
            f"generation {self.generation}, loaded by {self.origin}"
            f" from generation {self.source_generation}: {self.fds} FDs,"
            f" {self.state_bytes} bytes of state, {self.left_behind} left behind{paused}{refused}"
        )

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a status text; None if it is not ours."""
        text, _, refused = text.partition(_REFUSED)
        if match := _COLD.fullmatch(text):
            aside = int(match["aside"]) if match["aside"] else None
            generation = int(match["generation"])
            return cls(generation, Origin.COLD, set_aside=aside, refused=refused)
        if match := _LOADED.fullmatch(text):
            generation, source, fds, size, left = (int(match[n]) for n in (1, 3, 4, 5, 6))
            pause = round(float(match["pause"]) / 1000, 4) if match["pause"] else None
            return cls(
                generation, Origin(match["origin"]), source, fds, size, left,
                pause=pause, refused=refused,
            )  # fmt: skip
        return None


_REFUSED = "; upgrade failed: "
_COLD = re.compile(
    r"generation (?P<generation>\d+), cold start"
    r"(?:, image of generation (?P<aside>\d+) set aside)?"
)
_LOADED = re.compile(
    r"generation (\d+), loaded by (?P<origin>restart|live|exec|insurance) from generation (\d+):"
    r" (\d+) FDs, (\d+) bytes of state, (\d+) left behind"
    r"(?:, paused (?P<pause>\d+\.\d) ms)?"
)
