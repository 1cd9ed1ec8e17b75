# SPDX-License-Identifier: LGPL-2.1-or-later
"""Timers: they go on over an upgrade, and what has expired unread is still counted. timerfd_create(2)."""

from __future__ import annotations

import ctypes
import struct
import time
from typing import TypedDict

from upgrader.backends.fdinfo import anonymous, number, texts
from upgrader.backends.kind import BackendKind
from upgrader.backends.libc import call

_NONBLOCK, _CLOEXEC = 0o4000, 0o2000000  # TFD_NONBLOCK, TFD_CLOEXEC
_TIMES = struct.Struct("qqqq")  # itimerspec: the interval, then the first expiry


class TimerFdFacts(TypedDict):
    """`clock`: of clock_gettime(2); `interval`: in seconds and nanoseconds; `left`: likewise, until it
    expires next."""

    clock: int
    interval: str
    left: str


class TimerFd(BackendKind, name="timerfd"):
    """A non-blocking timer that expires every `interval` seconds, from then on. The kernel gives timers
    no identity: verified are the clock and the interval."""

    facts = TimerFdFacts
    changing = frozenset({"left"})

    def __init__(self, interval: float, clock: int = time.CLOCK_MONOTONIC) -> None:
        """`clock`: one of `time.CLOCK_*`."""
        self._interval = interval
        self._clock = clock

    def open(self) -> int:
        """Make a new one, and start it."""
        fd = call("timerfd_create", self._clock, _NONBLOCK | _CLOEXEC)
        seconds, nanoseconds = divmod(round(self._interval * 1e9), 10**9)
        times = _TIMES.pack(seconds, nanoseconds, seconds, nanoseconds)
        call("timerfd_settime", fd, 0, ctypes.c_char_p(times), None)
        return fd

    def refuse(self, fd: int) -> str:
        """Say why it is no timer."""
        return "" if anonymous(fd) == "timerfd" else "it is no timerfd"

    def describe(self, fd: int) -> TimerFdFacts:
        """Say how it is set."""
        interval, left = (texts(fd, name)[0] for name in ("it_interval", "it_value"))
        return {"clock": number(fd, "clockid"), "interval": interval, "left": left}
