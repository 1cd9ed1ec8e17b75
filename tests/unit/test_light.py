# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is loaded by whom: takeover gets by on a part of the standard library, and a program loads
what it uses."""

import subprocess
import sys

import pytest

from upgrader.protocol.values import Value

#: All of ours that takeover loads.
TAKEOVER = {
    "_version",
    "codes",
    "errors",
    "protocol",
    "protocol.fd",
    "protocol.rendezvous",
    "protocol.systemd_syntax",
    "protocol.takeover_line",
    "protocol.values",
    "protocol.varlink",
    "protocol.varlink_client",
    "systemd",
    "systemd.bus",
    "systemd.bus_values",
    "systemd.cgroup",
    "systemd.journal",
    "systemd.live_limits",
    "systemd.main_command",
    "systemd.notify",
    "systemd.precedence",
    "systemd.process_start",
    "systemd.unit",
    "takeover",
    "takeover.__main__",
    "takeover.launch",
    "takeover.running_instance",
}
#: Each of them takes longer to import than all of ours together.
HEAVY = {"msgspec", "dataclasses", "typing", "logging", "pathlib", "importlib", "inspect", "shutil"}
HEAVY |= {"asyncio", "subprocess", "threading", "datetime", "argparse", "tempfile", "ssl"}
_SHOW = "print(*sys.modules)\nsys.stdout.flush()\nos._exit(0)"


def loaded(code: str) -> set[str]:
    """The modules that this code loads, until it says SHOW."""
    code = f"import os, sys\nsys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-S", "-c", code.replace("SHOW", _SHOW)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.split())


def ours(modules: set[str]) -> set[str]:
    return {name.removeprefix("upgrader.") for name in modules if name.startswith("upgrader.")}


def test_takeover_at_its_first_question() -> None:
    """When it asks systemd about the unit, all is there that it needs; and no more."""
    modules = loaded(
        """
def heard(event, arguments):
    if event == "socket.connect":
        exec(shown)
shown = '''SHOW'''
sys.addaudithook(heard)
from upgrader.takeover import __main__ as takeover
takeover.main([])
"""
    )

    assert TAKEOVER == ours(modules)
    assert not HEAVY & modules


def test_the_package_alone() -> None:
    """A name is loaded when somebody asks for it."""
    assert {"_version"} == ours(loaded("import upgrader\nSHOW"))
    assert not HEAVY & loaded("import upgrader\nSHOW")
    assert {"_version", "codes", "errors"} == ours(loaded("from upgrader import VerifyError\nSHOW"))


def test_a_name_is_not_lost_to_its_module() -> None:
    """`upgrader.attach` is the class, whichever is imported first."""
    code = "import upgrader.attach; from upgrader.attach import attach; assert upgrader.attach is attach"
    assert "attach" in ours(loaded(f"{code}\nSHOW"))


def test_the_help_of_takeover() -> None:
    """It is asked for by people, and is no upgrade that has failed; nor is another argument."""
    for argument, code in ("--help", 0), ("-h", 0), ("--now", 2):
        command = [sys.executable, "-m", "upgrader.takeover", argument]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert code == done.returncode
        told, silent = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
        assert "ExecReload=/usr/bin/python3 -m upgrader.takeover" in told
        assert "" == silent


class Point(Value):
    x: int
    y: int = 0


class Other(Value):
    x: int
    y: int = 0


def test_values() -> None:
    """They are like frozen dataclasses."""
    assert Point(1) == Point(x=1, y=0) == Point(3).replace(x=1)
    assert Point(1) != Other(1)  # type: ignore[comparison-overlap]
    assert 1 == len({Point(1), Point(1, 0), Point(y=0, x=1)})
    assert "Point(x=1, y=0)" == repr(Point(1))
    with pytest.raises(AttributeError, match="frozen"):
        Point(1).x = 2  # type: ignore[misc]
    for values, named in ((), {}), ((1, 2, 3), {}), ((1,), {"x": 2}), ((1,), {"z": 2}):
        with pytest.raises(TypeError, match="Point has the fields x, y"):
            Point(*values, **named)  # type: ignore[arg-type]
