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


def test_a_new_process_is_not_left_in_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its courtesy is taken back until that has worked: on a busy machine it would never be ready."""
    answers = [False, False, True]
    monkeypatch.setattr(
        precedence, "_set", lambda nice, pid: (nice, pid) == (0, 77) and answers.pop(0)
    )
    courtesy = precedence.Courtesy(77)
    while courtesy.left is not None:
        assert 0 < courtesy.left < 1
        courtesy.end()

    assert [] == answers
