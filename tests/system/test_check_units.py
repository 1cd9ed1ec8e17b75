# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader check` and the units that distributions and admins write: no untrue word, no harm."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.reloading import installed, live
from tests.system.serving import Install
from tests.system.tool import found, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

FOREIGN = """\
[Service]
User=daemon
ExecStart=sleep infinity
ExecReload=true
"""


@pytest.fixture
def foreign(any_machine: PrivateSystemd) -> Iterator[str]:
    """A unit that does not use the library, and is not started."""
    any_machine.write("/etc/systemd/system/plain.service", FOREIGN)
    any_machine.run(["systemctl", "daemon-reload"])
    yield "plain.service"
    any_machine.run(["systemctl", "stop", "plain.service"])
    any_machine.run(["rm", "-rf", "/etc/systemd/system/plain.service", *_drop_ins("plain.service")])
    any_machine.run(["systemctl", "daemon-reload"])


def _drop_ins(unit: str) -> list[str]:
    return [f"/etc/systemd/system/{unit}.d"]


def report(machine: PrivateSystemd, unit: str, *more: str) -> Any:
    return json.loads(upgrader(machine, "check", unit, "--json", *more).stdout)


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "stopped"])
def test_n3_a_unit_that_is_not_ours(any_machine: PrivateSystemd, foreign: str, runs: bool) -> None:
    """Nothing is proposed and nothing is written, unless that is forced: for a unit whose program is
    about to use the library."""
    if runs:
        any_machine.run(["systemctl", "start", foreign])
    said = report(any_machine, foreign)
    assert ("none", False) == (said["mode"], said["ours"])
    assert [""] == [each["setting"] for each in said["findings"]]
    before = any_machine.run(["systemctl", "cat", foreign]).stdout

    fixed = upgrader(any_machine, "check", foreign, "--fix")

    assert (1 if runs else 3) == fixed.returncode
    assert f"upgrader check --force {foreign}" in fixed.stderr
    assert before == any_machine.run(["systemctl", "cat", foreign]).stdout
    settings = {each["setting"] for each in report(any_machine, foreign, "--force")["findings"]}
    assert {"Type=notify", "RuntimeDirectory=plain"} <= settings
    forced = upgrader(any_machine, "check", foreign, "--fix", "--force")
    assert "Type=notify" in forced.stderr
    assert "Type=notify" in any_machine.run(["systemctl", "cat", foreign]).stdout


def test_u11_a_unit_that_does_not_run(any_machine: PrivateSystemd, foreign: str) -> None:
    """As which user it runs, nobody knows."""
    findings = report(any_machine, foreign, "--force")["findings"]

    assert "it is not running" in findings[0]["what"]
    assert not [each for each in findings if "User=" in each["what"]]


def test_u11_a_program_that_another_starts(any_machine: PrivateSystemd, foreign: str) -> None:
    """check knows some that do."""
    start = "[Service]\nExecStart=/usr/bin/uv run python -m upgrader.asgi app:app\n"
    any_machine.write(f"/etc/systemd/system/{foreign}", start)
    any_machine.run(["systemctl", "daemon-reload"])
    said = report(any_machine, foreign)
    (one,) = [each for each in said["findings"] if "ExecStart= runs uv" in each["what"]]

    assert ("blocker", True) == (one["severity"], said["ours"])
    assert ".venv/bin/python" in one["remedy"]


def test_u11_settings_that_surprise(any_machine: PrivateSystemd, install: Install) -> None:
    """Each is named with a remedy: a log file that a reload empties or writes over, and an instance
    that ends by itself, after which none is started."""
    lines = [
        "Restart=on-failure",
        "StandardOutput=truncate:/run/out",
        "StandardError=file:/run/err",
    ]
    service = installed(any_machine, install, "surprising", *lines)
    said = {each["what"]: each for each in found(service)["findings"]}

    for part in ("StandardOutput=truncate", "StandardError=file", "Restart=on-failure"):
        (one,) = [text for text in said if text.startswith(part)]
        assert said[one]["remedy"]


def test_u11_a_program_behind_another(any_machine: PrivateSystemd, install: Install) -> None:
    """Only the main process can be an instance: one that the main process has started is told whom
    systemd has started instead of it, and what to write into the unit."""
    start = (
        f"ExecStart=/bin/sh -c '{' '.join(any_machine.python)} /opt/upgrader-tests/holder.py; true'"
    )
    lines = ["Restart=no", *live(any_machine, "wrapped"), "ExecStart=", start]
    with contextlib.suppress(Exception):
        install(any_machine, "wrapped", "holder", *lines)
    words = any_machine.run(["journalctl", "-q", "--no-pager", "-u", "wrapped"]).stdout

    assert "systemd started sh, process " in words, words
    assert "ExecStart=" in words
    assert "template units" not in words


def test_further_sockets_of_one_name_are_declared(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """Each of them, and no finding says otherwise."""
    any_machine.write(
        "/etc/systemd/system/wide.socket",
        "[Socket]\nListenStream=127.0.0.1:7999\nListenStream=127.0.0.2:7999\n"
        "FileDescriptorName=door\n",
    )
    try:
        service = installed(any_machine, install, "wide", "\n[Unit]\nRequires=wide.socket")
        (door,) = service.ask("Describe")["backends"]

        assert [] == [each for each in found(service)["findings"] if "listens on" in each["what"]]
        assert ["127.0.0.1:7999", "127.0.0.2:7999"] == sorted(door["addresses"])
    finally:
        any_machine.run(["systemctl", "stop", "wide.service", "wide.socket"])
        any_machine.run(["rm", "/etc/systemd/system/wide.socket"])
