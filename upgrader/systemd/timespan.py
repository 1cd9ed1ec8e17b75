# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time spans as systemd writes them (systemd.time(7)); knows no clocks and no dates."""

import math
import re

_UNITS = {
    "": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0,
    "us": 1e-6, "usec": 1e-6, "µs": 1e-6, "μs": 1e-6,
    "ms": 1e-3, "msec": 1e-3,
    "m": 60.0, "min": 60.0, "minute": 60.0, "minutes": 60.0,
    "h": 3600.0, "hr": 3600.0, "hour": 3600.0, "hours": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0,
}  # fmt: skip
_PART = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-zµμ]*)")


def parse_time_span(text: str) -> float:
    """Seconds of a time span such as `500ms`, `5`, `1min 30s` or `infinity`.

    Raises ValueError, with a message for people.
    """
    if text.strip() == "infinity":
        return math.inf
    seconds, at = 0.0, 0
    rest = text.rstrip()
    while at < len(rest):
        part = _PART.match(rest, at)
        if part is None or part[2] not in _UNITS:
            at = -1
            break
        seconds += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    if at <= 0:
        raise ValueError(f"{text!r} is not a time span; write it as 5s, 500ms or 1min 30s")
    return seconds


def format_time_span(seconds: float) -> str:
    """A short form for people, in the same units: `0.142s`, `12.3s`, `2min 5s`."""
    if seconds == math.inf:
        return "infinity"
    if seconds < 60:
        return f"{seconds:.3f}s" if seconds < 10 else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}min {rest}s" if rest else f"{minutes}min"
