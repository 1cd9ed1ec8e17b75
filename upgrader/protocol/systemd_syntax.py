# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time spans and booleans as systemd writes them; systemd.time(7), systemd.syntax(7)."""

import re

#: Longest wait, in seconds: poll(2) counts milliseconds in 31 bits, and to a migration this is
#: the same as "infinity".
LONGEST = 14 * 86400.0

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
_SPAN = r"\s*([0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)\s*([^\W\d]*)"
_ON = {"1", "yes", "y", "true", "t", "on"}
_OFF = {"0", "no", "n", "false", "f", "off"}


def time_span(text: str) -> float:
    """A time span in seconds, written as in systemd.time(7): `5s`, `1min 30s`, `500ms`, `infinity`.

    Raises ValueError that names the text.
    """
    if text.strip() == "infinity":
        return float("inf")
    total, at = 0.0, 0
    span = re.compile(_SPAN)
    while match := span.match(text, at):
        if match[2] not in _UNITS:
            break
        total += float(match[1]) * _UNITS[match[2]]
        at = match.end()
    if at == 0 or text[at:].strip():
        raise ValueError(f"{text!r} is not a time span such as 5s, 1min 30s or 500ms")
    return total


def show_span(seconds: float) -> str:
    """A time span as systemd writes it: `300ms`, `1min 30s`, `infinity`."""
    if seconds >= LONGEST:
        return "infinity"
    parts = []
    usec = round(seconds * 1e6)
    for size, unit in (
        (86400 * 10**6, "d"), (3600 * 10**6, "h"), (60 * 10**6, "min"), (10**6, "s"),
        (1000, "ms"), (1, "us"),
    ):  # fmt: skip
        count, usec = divmod(usec, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts) or "0"


def boolean(text: str) -> bool:
    """A boolean as systemd reads it; raises ValueError that names the text."""
    if text.lower() in _ON:
        return True
    if text.lower() in _OFF:
        return False
    raise ValueError(f"{text!r} is neither yes nor no")
