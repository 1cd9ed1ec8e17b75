# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests of hooks: many become one, and none is lost when who serves it is killed."""

import fcntl
import stat
import threading
from pathlib import Path

import pytest

from upgrader.hooks.queue import AskedBy, Requests, TurnTaken

UNIT = "web.service"


def test_ten_at_a_time_are_served_by_one(tmp_path: Path) -> None:
    """Whoever has the turn serves all that were filed; the others find theirs served, and how."""
    served: list[str] = []
    told: list[str] = []
    filed = threading.Barrier(10)

    def ask(number: int) -> None:
        requests = Requests(tmp_path)
        requests.file(UNIT, AskedBy.STALE)
        filed.wait()
        with requests.turn(UNIT) as turn:
            if turn.origins:
                turn.claim()
                served.append(str(number))
                turn.served(True, f"done by {number}")
            elif turn.last:
                told.append(turn.last.line)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 == len(served)
    assert [f"done by {served[0]}"] * 9 == told
    assert [] == Requests(tmp_path).units()


def test_a_request_during_an_upgrade_is_not_served_by_it(tmp_path: Path) -> None:
    """It may be about files that the new instance has not read."""
    requests = Requests(tmp_path)
    requests.file(UNIT, AskedBy.STALE)
    with requests.turn(UNIT) as turn:
        turn.claim()
        requests.file(UNIT, AskedBy.INSTALLED)
        turn.served(True, "the first")

    with requests.turn(UNIT) as turn:
        assert {AskedBy.INSTALLED} == turn.origins


def test_a_claim_outlives_who_made_it(tmp_path: Path) -> None:
    """Killed in the middle, it is there for the next one, with its origin."""
    requests = Requests(tmp_path)
    requests.file(UNIT, AskedBy.INSTALLED)
    with requests.turn(UNIT) as turn:
        turn.claim()

    again = Requests(tmp_path)
    assert [UNIT] == again.units()
    again.file(UNIT, AskedBy.STALE)
    with again.turn(UNIT) as turn:
        turn.claim()
        assert {AskedBy.INSTALLED} == turn.origins
        turn.served(False, "too bad")
        assert not turn.origins
        assert turn.last is not None
        assert (False, "too bad") == (turn.last.done, turn.last.line)


def test_words_of_another_version(tmp_path: Path) -> None:
    """A request is one even if its word, or the record of the last one, is not understood."""
    requests = Requests(tmp_path)
    (tmp_path / "filed" / UNIT).write_text("moonphase\n")
    (tmp_path / "last" / UNIT).write_text("{")
    with requests.turn(UNIT) as turn:
        assert {AskedBy.STALE} == turn.origins
        assert turn.last is None


def test_nobody_else_can_open_a_lock(tmp_path: Path) -> None:
    """Also in a directory that was made for all to read: it is root's from the first use on."""
    place = tmp_path / "hook"
    (place / "lock").mkdir(parents=True)
    place.chmod(0o755)

    Requests(place)

    assert 0o700 == stat.S_IMODE(place.stat().st_mode)


def test_a_lock_that_is_never_given_back(tmp_path: Path) -> None:
    """Who waits is told after its patience, and the request is there for the next one."""
    requests = Requests(tmp_path, patience=0.2)
    requests.file(UNIT, AskedBy.INSTALLED)
    with (tmp_path / "lock" / UNIT).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TurnTaken, match=f"{UNIT}: .* for 0.2s"), requests.turn(UNIT):
            pass

    assert [UNIT] == requests.units()
    with requests.turn(UNIT) as turn:
        assert {AskedBy.INSTALLED} == turn.origins
