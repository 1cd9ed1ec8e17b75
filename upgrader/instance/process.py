# SPDX-License-Identifier: LGPL-2.1-or-later
"""This process itself: its signals, its FDs, its watchdog."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping

from upgrader.errors import BusError
from upgrader.protocol.fd import Fd
from upgrader.protocol.later import later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.systemd import bus
else:
    bus = later("upgrader.systemd.bus")

_BUS = 2.0  # seconds for PID 1 to answer
_given: dict[int, int] = {}  # soft limits that were raised here, as they were
_TABLE = 1 << 14  # FDs, at 8 bytes of the kernel's memory each


def _environment() -> bytes:
    with contextlib.suppress(OSError), open("/proc/self/environ", "rb") as file:
        return file.read()
    return b""


#: What this process was given, before the program has changed any of it.
ENVIRONMENT = _environment()


def stop_signals(supervised: bool) -> set[int]:
    """The signals that always stop an instance: SIGTERM and SIGINT, below systemd SIGQUIT as well
    (see systemd.kill(5)), unless the program handles it."""
    return {signal.SIGTERM, signal.SIGINT, *unhandled(signal.SIGQUIT if supervised else None)}


def reload_signals(supervised: bool) -> set[int]:
    """The signals that always make an instance reload: SIGHUP below systemd."""
    return unhandled(signal.SIGHUP if supervised else None)


def unhandled(*numbers: int | None) -> set[int]:
    """Those for which the program has no handler of its own."""
    default = (signal.SIG_DFL, signal.SIG_IGN, None)
    return {number for number in numbers if number and signal.getsignal(number) in default}


def is_main(unit: str) -> bool:
    """Whether PID 1 takes this process for the main one; what it does not say counts as yes."""
    try:
        with bus.Bus(_BUS) as pid1:
            return bool(pid1.get(unit, "MainPID") == os.getpid())
    except BusError:
        return True


def watchdog_span(environment: Mapping[str, str], own: str) -> float:
    """WatchdogSec= in seconds, if it is meant for this process; else 0."""
    usec = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", own) != own or not usec.isdecimal():
        return 0.0
    return int(usec) / 1e6


def reserve(count: int) -> list[Fd]:
    """Numbers that clients cannot use up: parking opens a few FDs, and so does loading."""
    kept: list[Fd] = []
    if count < 1:
        return kept
    with contextlib.suppress(OSError):
        kept.append(Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
        while len(kept) < count:
            kept.append(kept[0].duplicate())
    return kept


def free_numbers() -> int:
    """About how many more FDs this process may open: numbers are given from the lowest on."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as lowest:
            return soft - lowest.fileno()
    except OSError:
        return 0


@contextlib.contextmanager
def given_limits() -> Iterator[None]:
    """Have the soft limits that this process was started with, for an execve(2)."""
    now = {number: resource.getrlimit(number) for number in _given}
    for number, (_, hard) in now.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(number, (_given[number], hard))
    try:
        yield
    finally:
        for number, limits in now.items():
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(number, limits)


def make_room_for_fds() -> None:
    """As many FDs as this process may have, and the kernel's table of the first 16,384 at once; call
    it before there is a second thread.

    The kernel doubles the table on demand, and from the second thread on it waits for an RCU grace
    period then, with all threads that open or accept something: 10 to 20 ms. See
    expand_fdtable() in its fs/file.c.
    """
    # The kernel counts FDs in flight per user against the sender's soft limit (ETOOMANYREFS).
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _given.setdefault(resource.RLIMIT_NOFILE, soft)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = (_TABLE if soft == resource.RLIM_INFINITY else min(soft, _TABLE)) - 1
    with contextlib.suppress(OSError), open(os.devnull, "rb", buffering=0) as any_file:
        os.close(fcntl.fcntl(any_file, fcntl.F_DUPFD_CLOEXEC, last))


def in_loop() -> bool:
    """Whether an asyncio loop runs in this thread; asyncio is not loaded for that."""
    return "asyncio" in sys.modules and sys.modules["asyncio"]._get_running_loop() is not None


def begin_thread(call: Callable[[], object]) -> None:
    """Have it done by a thread that does not hold up the end of the process; returns at once.

    `threading.Thread.start` waits until the thread runs, which on a busy machine takes milliseconds in
    which clients wait, too.
    """
    _thread.start_new_thread(call, ())
