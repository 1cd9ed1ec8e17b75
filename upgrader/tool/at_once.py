# SPDX-License-Identifier: LGPL-2.1-or-later
"""Do work that mostly waits side by side, in threads."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: Threads for one call of `at_once`.
_MOST = 128


def at_once(work: Sequence[Callable[[], T]]) -> list[T]:
    """What each of `work` returns, in that order; raises what the first of them raises that does."""
    if len(work) < 2:
        return [each() for each in work]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(work), _MOST)) as pool:
        return list(pool.map(lambda each: each(), work))
