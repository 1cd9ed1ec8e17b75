# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parameters of a migration, as the unit's environment sets them; decides nothing.

`Environment=UPGRADER_DRAIN_TIMEOUT=30s` in a drop-in is what PID 1 really applied, so that is where
they come from. `UPGRADER=off` is the kill switch: a plain service.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from upgrader.errors import DeclarationError

#: Tells a new process that it is a destination: `FD:ADJUSTMENT:PATH`, its line to takeover, the
#: oom_score_adj of the unit, and the path of the running instance's socket.
TAKEOVER = "UPGRADER_TAKEOVER"
SOCKET = "upgrader.sock"

_UNITS = {
    "us": 1e-6, "usec": 1e-6, "\N{MICRO SIGN}s": 1e-6, "\N{GREEK SMALL LETTER MU}s": 1e-6,
    "ms": 1e-3, "msec": 1e-3,
    "": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0,
    "m": 60.0, "min": 60.0, "minute": 60.0, "minutes": 60.0,
    "h": 3600.0, "hr": 3600.0, "hour": 3600.0, "hours": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0,
    "w": 604800.0, "week": 604800.0, "weeks": 604800.0,
    "M": 2629800.0, "month": 2629800.0, "months": 2629800.0,  # systemd's: 30.4375 days
    "y": 31557600.0, "year": 31557600.0, "years": 31557600.0,  # 365.25 days
}  # fmt: skip
_SPAN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)\s*([^\W\d]*)")
#: Longest wait, in seconds: poll(2) counts milliseconds in 31 bits, and to a migration this is
#: the same as "infinity".
_LONGEST = 14 * 86400.0
_ON = {"1", "yes", "y", "true", "t", "on"}
_OFF = {"0", "no", "n", "false", "f", "off"}


def time_span(text: str) -> float:
    """A time span in seconds, written as in systemd.time(7): `5s`, `1min 30s`, `500ms`, `infinity`.

    Raises ValueError that names the text.
    """
    if text.strip() == "infinity":
        return float("inf")
    total, at = 0.0, 0
    while match := _SPAN.match(text, at):
        if match[2] not in _UNITS:
            break
        total += float(match[1]) * _UNITS[match[2]]
        at = match.end()
    if at == 0 or text[at:].strip():
        raise ValueError(f"{text!r} is not a time span such as 5s, 1min 30s or 500ms")
    return total


def boolean(text: str) -> bool:
    """A boolean as systemd reads it; raises ValueError that names the text."""
    if text.lower() in _ON:
        return True
    if text.lower() in _OFF:
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def _wait(text: str) -> float:
    return min(time_span(text), _LONGEST)


def _attempts(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"{text!r} is not a number of attempts from 1 on")
    return int(text)


def _generation(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is neither a generation nor 'all'")
    return text


def socket_path(environment: Mapping[str, str]) -> Path | None:
    """Where an instance listens: in its RuntimeDirectory=; None if the unit has none."""
    first = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(first, SOCKET) if first else None


@dataclass(frozen=True, slots=True)
class Parameters:
    """`drain_timeout` in seconds; `downtime_limit`: seconds that a live migration may wait for safe
    points, and for progress of the destination; `migration_timeout`: seconds for all of it;
    `insurance`: seconds after a live upgrade in which a crash goes back to the switchover;
    `load_attempts`: after so many the image is set aside.

    `load_attempts` lies above StartLimitBurst= (5 by default): one bad version meets systemd's
    start limit first, and the image waits for a good one. `discard` sets the image aside at once
    ("all", or a generation).
    """

    enabled: bool = True
    drain_timeout: float = 10.0
    downtime_limit: float = 0.3
    migration_timeout: float = 30.0
    insurance: float = 5.0
    load_attempts: int = 10
    discard: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read UPGRADER and UPGRADER_*; raises DeclarationError that names the variable."""
        values: dict[str, object] = {}
        for variable, (field, parse) in _VARIABLES.items():
            if text := environment.get(variable, ""):
                try:
                    values[field] = parse(text)
                except ValueError as error:
                    raise DeclarationError(variable, str(error)) from error
        return cls(**values)  # type: ignore[arg-type]

    @staticmethod
    def unknown(environment: Mapping[str, str]) -> list[str]:
        """Variables that look like ours and are not: a typing error worth a warning."""
        return [v for v in environment if v.startswith("UPGRADER_") and v not in _VARIABLES]


_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "UPGRADER": ("enabled", boolean),
    "UPGRADER_DRAIN_TIMEOUT": ("drain_timeout", _wait),
    "UPGRADER_DOWNTIME_LIMIT": ("downtime_limit", _wait),
    "UPGRADER_MIGRATION_TIMEOUT": ("migration_timeout", _wait),
    "UPGRADER_INSURANCE": ("insurance", _wait),
    "UPGRADER_LOAD_ATTEMPTS": ("load_attempts", _attempts),
    "UPGRADER_DISCARD": ("discard", _generation),
}
