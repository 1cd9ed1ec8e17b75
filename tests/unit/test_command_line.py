# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of a main process is the one that PID 1 would make; systemd.service(5)."""

import subprocess
import sys
from collections.abc import Mapping

import pytest

from tests.unit.units import unit
from upgrader.systemd.main_command import MainCommand as Process
from upgrader.systemd.main_command import expand, main_process
from upgrader.systemd.unit import UNSET, ExecCommand, Unit

ENVIRONMENT = {
    "ONE": "1",
    "TWO": "a b",
    "QUOTED": "'c d' e",
    "OPEN": "it's",
    "EMPTY": "",
    "ESCAPED": "a\\ b 'c\\'' d\\",
}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("plain", ["plain"]),
        ("${ONE}", ["1"]),
        ("${TWO}", ["a b"]),
        ("$TWO", ["a", "b"]),
        ("$QUOTED", ["c d", "e"]),
        ("$OPEN", ["its"]),
        ("$EMPTY", []),
        ("${EMPTY}", [""]),
        ("$UNSET", []),
        ("x${ONE}y${TWO}", ["x1ya b"]),
        ("$$", ["$"]),
        ("a$$b", ["a$b"]),
        ("$${ONE}", ["${ONE}"]),
        ("a$ONE", ["a$ONE"]),
        ("$1", []),
        ("${1}", [""]),
        ("", [""]),
        ("$", []),
        ("$ONE$TWO", []),
        ("${ONE:-x}", ["${ONE:-x}"]),
        ("${ONE$$:$$", ["${ONE$$:$"]),
        ("a${ONE", ["a${ONE"]),
        ("a$", ["a$"]),
        ("$ESCAPED", ["a b", "c'", "d"]),
    ],
)
def test_variables(argument: str, words: list[str]) -> None:
    assert words == expand([argument], ENVIRONMENT)


def made(of: Unit, control: Mapping[str, str], running: Mapping[str, str] | None = None) -> Process:
    return main_process(of, control, 9, running or {})


def test_every_word_is_expanded() -> None:
    """The name that the program is given included; and nothing with the prefix `:`."""
    line = ("$ONE", "$TWO")
    expanded = made(unit(exec_start=(ExecCommand("/bin/x", line, ()),)), ENVIRONMENT)
    assert ["1", "a", "b"] == expanded.arguments
    assert "/bin/x" == expanded.path
    literal = ExecCommand("/bin/x", line, ("no-env-expand",))
    assert ["$ONE", "$TWO"] == made(unit(exec_start=(literal,)), ENVIRONMENT).arguments


def test_a_program_without_a_path_is_looked_up() -> None:
    """As PID 1 does: in ExecSearchPath=, or where all programs are, whatever PATH says."""
    command = (ExecCommand("sh", ("sh",), ()),)
    assert made(unit(exec_start=command), {"PATH": "/nowhere"}).path.endswith("bin/sh")
    for place, path in ("/bin", "/bin/sh"), ("/nowhere", "sh"):
        searched = unit(exec_start=command, exec_search_path=("/proc", place))
        assert path == made(searched, {"PATH": "/bin"}).path


def test_what_belongs_to_a_control_process_stays_there() -> None:
    """And what PID 1 gives to a main process only is added. What only looks like that is the unit's."""
    control = {
        "MAINPID": "7", "SYSTEMD_EXEC_PID": "8", "TRIGGER_UNIT": "x.timer", "REMOTE_ADDR": "::1",
        "MONITOR_UNIT": "x.service", "EXIT_CODE": "0",
    }  # fmt: skip
    kept = {"LANG": "C", "LISTEN_ADDRESS": "::", "MONITOR_SECONDS": "5", "REMOTE_URL": "x"}
    given = made(unit(watchdog_usec=5_000_000), {**control, **kept}).environment
    watched = {"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "9"}
    assert {**kept, **watched, "SYSTEMD_EXEC_PID": "9"} == given
    for off in (0, UNSET):
        given = made(unit(watchdog_usec=off), {**control, **kept}).environment
        assert {**kept, "SYSTEMD_EXEC_PID": "9"} == given


def test_what_the_unit_unsets() -> None:
    """By name, or by name and value; also what PID 1 makes."""
    unset = ("SYSTEMD_EXEC_PID", "WATCHDOG_PID=9", "WATCHDOG_USEC=1")
    given = made(unit(watchdog_usec=5_000_000, unset_environment=unset), {}).environment
    assert {"WATCHDOG_USEC": "5000000"} == given


def test_what_the_running_process_was_passed() -> None:
    """Its credentials; and its LISTEN_ variables: in the command line as if they were for the new one,
    in the environment for nobody, as the FDs come another way."""
    running = {
        "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "LISTEN_PID": "7", "CREDENTIALS_DIRECTORY": "/c",
        "OTHER": "x",
    }  # fmt: skip
    words = ("x", "${LISTEN_FDS}", "$LISTEN_FDNAMES", "${LISTEN_PID}", "${CREDENTIALS_DIRECTORY}")
    process = made(unit(exec_start=(ExecCommand("/bin/x", words, ()),)), {}, running)
    assert ["x", "2", "a:b", "9", "/c"] == process.arguments
    del running["OTHER"]
    running["LISTEN_PID"] = "4194305"
    assert {"SYSTEMD_EXEC_PID": "9", **running} == process.environment


def test_the_environment_that_was_given() -> None:
    """Not what Python has made of it: LC_CTYPE in a C locale, for one."""
    code = "import os; from upgrader.systemd.main_command import given_environment as given;"
    code += "print(given() == {'A': 'b=\\udcff'}, len(os.environ))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={b"A": b"b=\xff"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "True 2\n" == shown
