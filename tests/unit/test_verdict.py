# SPDX-License-Identifier: LGPL-2.1-or-later
"""What instances of either interface say, and what the tool makes of it."""

from typing import Any

import pytest

from tests.unit.units import unit
from upgrader.codes import Code
from upgrader.protocol.parameters import Mode
from upgrader.protocol.phase import Decision, Phase
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink_types import Description, Last, Loaded, Migration, Refusal
from upgrader.tool import failure_cause
from upgrader.tool.attempt import Attempt
from upgrader.tool.instance_client import status
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.verdict import _of_migration, is_newer

ID = "0" * 31 + "1"


def old(**values: Any) -> Description:
    """An instance of interface 1, which was loaded by a restart."""
    came = Migration(Phase.DONE, "restart", 1, 2, fds=3, bytes=4, pause=0.5)
    return Description(
        **{"service": "web", "generation": 2, "library": "0.1.0", "migration": came} | values
    )


def new(**values: Any) -> Description:
    """An instance of interface 2 that has just taken over live."""
    last = Last(ID, "destination", Decision.COMMITTED, source=2, destination=3)
    came = Loaded("live", 2, 3, 4, 1, 0, 0.25)
    facts = {"service": "web", "generation": 3, "interface": 2, "last": last, "loaded": came}
    return Description(**facts | {"library": "1"} | values)


def attempt(before: Description | None) -> Attempt:
    return Attempt(None, unit(), before, Mode.LIVE, ID, None, print)  # type: ignore[arg-type]


def test_how_an_instance_came_to_be() -> None:
    """One of interface 2 says it for its life; of one of interface 1 the last migration does, until
    that is another one."""
    refusal = Refusal(ID, "verify-failed", "not with me", "", 1.0)
    cold = new(loaded=Loaded("cold", set_aside=2), refused=refusal)

    assert Status(3, Origin.LIVE, 2, 3, 4, 1, None, 0.25, "", "1") == status(new())
    assert Status(3, Origin.COLD, set_aside=2, refused="not with me", library="1") == status(cold)
    assert Origin.UNKNOWN is status(new(loaded=Loaded("by magic"))).origin
    assert Status(2, Origin.RESTART, 1, 3, 4, pause=0.5, library="0.1.0") == status(old())
    assert Origin.COLD is status(old(migration=Migration())).origin
    failed = status(old(migration=Migration(Phase.FAILED, "live", 2, 3, reason="not with me")))
    assert (Origin.UNKNOWN, "not with me") == (failed.origin, failed.refused)
    assert "origin unknown (library 0.1.0)" in str(failed)


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (new(), True),
        (new(last=Last("2" * 32, "destination", Decision.COMMITTED)), True),
        (new(generation=2, last=Last()), False),
        (new(generation=1, last=Last(), loaded=Loaded("cold")), False),
        (new(last=Last(ID, "source", Decision.ABORTED)), False),
        (old(generation=3), True),
        (old(), False),
    ],
)
def test_who_goes_on_from_the_one_before(main: Description, expected: bool) -> None:
    """Whoever has committed this upgrade, or has a later generation by another one."""
    assert expected == is_newer(attempt(old()), main)


def test_of_one_that_could_not_be_asked_before() -> None:
    """Only a destination that has committed counts."""
    assert is_newer(attempt(None), new())
    assert not is_newer(attempt(None), new(last=Last()))
    assert not is_newer(attempt(None), old())


@pytest.mark.parametrize(
    ("phase", "decision", "code"),
    [
        (Phase.SETUP, Decision.NONE, ""),
        (Phase.LOADING, Decision.NONE, ""),
        (Phase.COMMITTED, Decision.NONE, ""),
        (Phase.FAILED, Decision.ABORTED, Code.UNKNOWN),
        (Phase.CANCELLED, Decision.ABORTED, Code.CANCELLED),
        (Phase.PREFLIGHT, Decision.ABORTED, Code.PREFLIGHT_PASSED),
    ],
)
def test_an_instance_of_interface_1_is_judged_by_its_phase(
    phase: Phase, decision: Decision, code: str
) -> None:
    """Its reason is passed on, and never looked at; a migration of before says that none has begun."""
    now = old(migration=Migration(phase, "live", 2, 3, began=7.0, reason="cancelled"))

    said = _of_migration(now, old())
    none = _of_migration(old(), old())

    assert (decision, code) == (said.decision, said.code)
    assert (Decision.ABORTED, Code.TAKEOVER_GONE) == (none.decision, none.code)


def test_a_code_of_a_newer_library() -> None:
    """It is unknown, which is no reason to trust the version."""
    assert Code.UNKNOWN is Code("by magic")
    assert Code.UNKNOWN.suspects_version
    assert not Code.UNKNOWN.blames_version
    assert not Code.SOURCE_FAILED.suspects_version


def test_a_failure_is_never_a_success() -> None:
    """Each outcome is made by what happened."""
    with pytest.raises(ValueError, match="not done"):
        Outcome.failed(Verb.UPGRADE, "web.service", Result.DONE, "no")


def test_how_a_main_process_ended() -> None:
    """As PID 1 has it."""
    killed = unit(exec_main_code=2, exec_main_status=9)

    assert "the main process was killed by SIGKILL meanwhile" == failure_cause.ended(killed)
    exited = unit(exec_main_code=1, exec_main_status=3)
    assert "the main process ended meanwhile, with status 3" == failure_cause.ended(exited)
    assert not failure_cause.ended_well(exited)
    assert failure_cause.ended_well(unit(exec_main_code=1, exec_main_status=0))
    assert not failure_cause.ended_well(killed)
