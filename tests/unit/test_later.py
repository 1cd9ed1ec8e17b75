# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modules that are loaded in a thread, while others are loaded elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Iterator

import pytest

from upgrader.protocol import later

COUNT = 3000


@contextlib.contextmanager
def taking_turns_often() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_more_come_while_some_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an import in another thread: all are loaded in the end, those that have come meanwhile as well."""
    asked: set[str] = set()
    monkeypatch.setattr(later, "_load", asked.add)
    names = {f"first{number}": None for number in range(COUNT)}
    more = [f"more{number}" for number in range(COUNT)]
    adding = threading.Thread(target=lambda: [names.setdefault(name) for name in more])
    with taking_turns_often():
        adding.start()
        later._load_each(names)
        adding.join()
    later._load_each(names)

    assert asked == names.keys()
