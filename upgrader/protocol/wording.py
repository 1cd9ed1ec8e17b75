# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers as people read them, in systemd's ways: durations, sizes, points in time, and the plural."""

from __future__ import annotations

import time

_SECOND = 10**6
_MINUTE, _HOUR, _DAY = 60 * _SECOND, 3600 * _SECOND, 86400 * _SECOND
_LONG = ((7 * _DAY, "w"), (_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (_SECOND, "s"))
#: Below which duration, in microseconds, which unit with how many digits behind the point.
_SHORT = (
    (99_950, "ms", 1000, 1),
    (999_500, "ms", 1000, 0),
    (9_999_500, "s", _SECOND, 3),
    (59_950_000, "s", _SECOND, 1),
)
#: Of systemd.time(7): a month has 30.4375 days, and a year 365.25.
_AGES = (
    (31557600 * _SECOND, "year"), (2629800 * _SECOND, "month"), (7 * _DAY, "week"), (_DAY, "day"),
    (_HOUR, "h"),
)  # fmt: skip


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 FD`, `2 FDs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_duration(seconds: float) -> str:
    """Write a measured duration with as many digits as tell something: `4.3ms`, `484ms`, `2.345s`,
    `12.3s`, `2min 5s`, `1d 3h`."""
    usec = max(round(seconds * 1e6), 0)
    if usec < 1000:
        return f"{usec}us" if usec else "0"
    for limit, unit, size, digits in _SHORT:
        if usec < limit:
            number = f"{usec / size:.{digits}f}"
            return f"{number.rstrip('0').rstrip('.') if digits else number}{unit}"
    rest = round(usec, -6)
    parts: list[str] = []
    for size, unit in _LONG:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
    return " ".join(filter(None, parts[:2]))


def show_bytes(number: int) -> str:
    """Write a size: `210B`, `1.5K`, `7.1M`; K is 1024 bytes."""
    size, units = float(number), iter("KMGT")
    unit = "B"
    while size >= 1024 and (larger := next(units, "")):
        size, unit = size / 1024, larger
    return f"{number}B" if unit == "B" else f"{size:.1f}{unit}"


def show_time(seconds: float) -> str:
    """Write a point in time, in seconds of the Unix epoch: `Sat 2026-11-28 11:26:57 UTC`."""
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def show_age(seconds: float, *, brief: bool = False) -> str:
    """Write how long ago something was: `2min 3s ago`, `1 day 4h ago`, `just now`; if `brief`, in one
    unit only."""
    usec = round(seconds * 1e6)
    if usec < _SECOND:
        return "just now"
    for number, (size, noun) in enumerate(_AGES[:-1]):
        if usec >= size:
            count, rest = divmod(usec, size)
            below, unit = _AGES[number + 1]
            more = 0 if brief else rest // below
            words = (f"{more}h" if unit == "h" else counted(more, unit)) if more else ""
            return " ".join(filter(None, (counted(count, noun), words, "ago")))
    if 5 * _MINUTE <= usec < _HOUR:
        usec -= usec % _MINUTE
    span = show_duration(usec // _SECOND)
    return f"{span.split()[0] if brief else span} ago"
