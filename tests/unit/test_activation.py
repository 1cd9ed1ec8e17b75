# SPDX-License-Identifier: LGPL-2.1-or-later
"""FDs that PID 1 passed: taken by name in a process of their own, whose FDs 3, 4, ... they are."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

SCRIPT = """
import json, os, sys
from upgrader.errors import DeclarationError
from upgrader.systemd.listen_fds import take
environment = {name: value.replace("PID", str(os.getpid())) for name, value in json.loads(sys.argv[1]).items()}
for number in range(int(sys.argv[2])):
    os.dup2(0, 3 + number, inheritable=True)
try:
    found = take(environment)
except DeclarationError as error:
    print(json.dumps({"error": str(error), "left": list(environment)}))
else:
    print(json.dumps({
        "names": [item.name for item in found],
        "numbers": [item.fd.fileno() for item in found],
        "inherited": [os.get_inheritable(item.fd.fileno()) for item in found],
        "left": list(environment),
    }))
    for item in found:
        item.fd.detach()
"""


def take(environment: Mapping[str, str], *, fds: int = 2) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(environment), str(fds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def test_fds_are_taken_by_name() -> None:
    """They are CLOEXEC from now on, and the variables are gone; others stay."""
    found = take(
        {"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:http", "LISTEN_PIDFDID": "7", "HOME": "/"}
    )  # fmt: skip

    assert {
        "names": ["http", "http"],
        "numbers": [3, 4],
        "inherited": [False, False],
        "left": ["HOME"],
    } == found


@pytest.mark.parametrize(
    "pid", [{}, {"LISTEN_PID": ""}, {"LISTEN_PID": "1"}, {"LISTEN_PID": "PIDx"}]
)
def test_fds_of_another_process_are_left_alone(pid: dict[str, str]) -> None:
    """The variables stay, too: they may be inherited for somebody else."""
    environment = {**pid, "LISTEN_FDS": "2"}

    assert {"names": [], "numbers": [], "inherited": [], "left": list(environment)} == take(
        environment
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["unknown", "unknown"]),
        ("a", ["a", "unknown"]),
        ("a:", ["a", ""]),
        ("a:b:c", ["a", "b"]),
    ],
)
def test_missing_names(names: str | None, expected: list[str]) -> None:
    """As sd_listen_fds_with_names(3) has it: unknown."""
    listed = {} if names is None else {"LISTEN_FDNAMES": names}

    assert expected == take({"LISTEN_PID": "PID", "LISTEN_FDS": "2", **listed})["names"]


@pytest.mark.parametrize("count", ["", "two", "-1", "1.5", "²", "٣"])
def test_a_count_that_is_none(count: str) -> None:
    """The variable is named."""
    found = take({"LISTEN_PID": "PID", "LISTEN_FDS": count})

    assert found["error"].startswith(f"LISTEN_FDS: is {count!r}")


def test_more_than_are_open() -> None:
    """The variable and the FD are named, however large the count."""
    found = take({"LISTEN_PID": "PID", "LISTEN_FDS": "1000000000"})

    assert (
        "LISTEN_FDS: says 1000000000, but FD 5 is not open: Bad file descriptor" == found["error"]
    )


def test_none_passed() -> None:
    """A count of 0 is legal."""
    assert [] == take({"LISTEN_PID": "PID", "LISTEN_FDS": "0"}, fds=0)["names"]
