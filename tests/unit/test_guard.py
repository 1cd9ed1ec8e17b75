# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who watches a device that another process holds as well looks often, and first, as far as it is allowed to."""

import os
import threading

import pytest

from tests.support import cannot_run, eventually
from upgrader.instance.guard import Guard

FIRST = -20  # nice(2)


def how_it_looks() -> tuple[int, int, int]:
    """Watch nothing for some looks: how those are scheduled (sched(7)), how nicely, and what a process that is
    started there would be."""
    seen: list[tuple[int, int]] = []

    def look() -> bool:
        seen.append((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))
        return True

    with Guard(look):
        first = len(seen)  # the one before the thread begins
        assert eventually(lambda: len(seen) > first + 3)
    policy, nice = seen[-1]
    return policy & ~os.SCHED_RESET_ON_FORK, nice, policy & os.SCHED_RESET_ON_FORK


def may(what: str) -> None:
    """Skip if this process may not do as a guard does."""
    refused: list[str] = []

    def attempt() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), FIRST)
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except OSError as error:
            refused.append(f"{what}: {error.strerror}")

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    for each in refused:
        cannot_run(each)


def test_in_real_time() -> None:
    """Before all that is not, and what is started from it is not, either."""
    may("real time")
    policy, _, reset = how_it_looks()
    assert os.SCHED_RR == policy
    assert reset


def test_where_real_time_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with RestrictRealtime=: before all others that share the CPU as it does."""
    may("a nice value of -20")

    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    policy, nice, _ = how_it_looks()
    assert (os.SCHED_OTHER, FIRST) == (policy, nice)
