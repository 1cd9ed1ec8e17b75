# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of a main process is the one that PID 1 would make; systemd.service(5)."""

import pytest

from tests.unit.units import unit
from upgrader.command_line import expand, main_process
from upgrader.systemd.unit import UNSET, Command

ENVIRONMENT = {"ONE": "1", "TWO": "a b", "QUOTED": "'c d' e", "OPEN": "it's", "EMPTY": ""}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("plain", ["plain"]),
        ("${ONE}", ["1"]),
        ("${TWO}", ["a b"]),
        ("$TWO", ["a", "b"]),
        ("$QUOTED", ["c d", "e"]),
        ("$OPEN", ["it's"]),
        ("$EMPTY", []),
        ("${EMPTY}", [""]),
        ("$UNSET", []),
        ("x${ONE}y${TWO}", ["x1ya b"]),
        ("$$", ["$"]),
        ("a$$b", ["a$b"]),
        ("$${ONE}", ["${ONE}"]),
        ("a$ONE", ["a$ONE"]),
        ("$1", ["$1"]),
        ("${1}", ["${1}"]),
        ("", [""]),
    ],
)
def test_variables(argument: str, words: list[str]) -> None:
    assert words == expand([argument], ENVIRONMENT)


def test_the_program_itself_is_not_expanded() -> None:
    """Only what follows it is; and nothing with the prefix `:`."""
    line = ("$ONE", "$TWO")
    expanded = main_process(unit(exec_start=(Command("/bin/x", line, ()),)), ENVIRONMENT)
    assert ["$ONE", "a", "b"] == expanded.arguments
    literal = Command("/bin/x", line, ("no-env-expand",))
    assert ["$ONE", "$TWO"] == main_process(unit(exec_start=(literal,)), ENVIRONMENT).arguments


def test_a_program_without_a_path_is_looked_up() -> None:
    """As PID 1 does, in the PATH of the unit."""
    command = (Command("sh", ("sh",), ()),)
    assert "/bin/sh" == main_process(unit(exec_start=command), {"PATH": "/nowhere:/bin"}).path
    assert "sh" == main_process(unit(exec_start=command), {"PATH": "/nowhere"}).path


def test_what_belongs_to_a_control_process_stays_there() -> None:
    """And what PID 1 gives to a main process only is added."""
    control = {"MAINPID": "7", "SYSTEMD_EXEC_PID": "8", "LISTEN_FDS": "1", "LANG": "C"}
    given = main_process(unit(watchdog_usec=5_000_000), control).environment
    assert {"LANG": "C", "WATCHDOG_USEC": "5000000"} == given
    for off in (0, UNSET):
        assert {"LANG": "C"} == main_process(unit(watchdog_usec=off), control).environment
