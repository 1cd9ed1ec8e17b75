# SPDX-License-Identifier: LGPL-2.1-or-later
"""The judgement of a live upgrade, where PID 1 says things in an order that no machine can be made to show."""

from collections.abc import Iterator

from tests.unit.units import unit
from upgrader.reloading import _introduced
from upgrader.systemd.unit import Change, Unit, WaitTimeout


class _Late:
    """A PID 1 that takes MAINPID= and ends the reload before it reads what the new process says."""

    def __init__(self, *states: Unit) -> None:
        self.states = list(states)

    def changes(self, unit: Unit, timeout: float) -> Iterator[Change]:
        while self.states:
            yield Change({})
        raise WaitTimeout(unit.id, timeout)

    def unit(self, name: str) -> Unit:
        return self.states.pop(0)


def test_the_new_main_process_is_heard() -> None:
    """Its status comes after the end of the job, and is waited for."""
    old = unit(status_text="generation 1, cold start", main_pid=7)
    named = old.replace(main_pid=8)
    heard = named.replace(status_text="generation 2, loaded by live")

    assert heard == _introduced(_Late(named, heard, named), old, named)  # type: ignore[arg-type]
    assert heard == _introduced(_Late(), old, heard)  # type: ignore[arg-type]


def test_one_that_says_nothing_is_not_waited_for_for_ever() -> None:
    """Nor one that has ended."""
    old = unit(status_text="generation 1, cold start", main_pid=7)
    named = old.replace(main_pid=8)
    gone = named.replace(active_state="failed")

    assert named == _introduced(_Late(), old, named)  # type: ignore[arg-type]
    assert gone == _introduced(_Late(gone, named), old, named)  # type: ignore[arg-type]
