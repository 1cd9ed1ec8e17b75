# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who goes first, where the kernel lets only one process at a time say so."""

import threading

import pytest

from tests.support import eventually
from upgrader.systemd import precedence


def test_a_claim_is_made_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others set theirs meanwhile: else it would serve in last place for ever."""
    tries: list[int] = []

    def busy(nice: int, pid: int | str = "self") -> bool:
        tries.append(nice)
        return len(tries) == 5

    monkeypatch.setattr(precedence, "_set", busy)
    monkeypatch.setattr(precedence, "_PAUSE", 0.001)
    precedence.claim()

    assert eventually(lambda: tries == [0] * 5)
    assert eventually(lambda: "upgrader-precedence" not in {t.name for t in threading.enumerate()})
