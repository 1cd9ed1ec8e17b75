# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service, or a user of the machine, that means harm to root's tool: the others are shown and upgraded
as ever, each command ends in time, and nothing that it has written controls a terminal."""

import json
import time

import pytest

from tests.system.reloading import installed
from tests.system.serving import Install, Service, hook
from tests.system.tool import NOBODY, upgrader
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.systemd.journal import MESSAGE_ID

#: Seconds for a command: as many deadlines of a question as a busy machine may make of two.
FAR = 60.0
_FORGED = """\
import socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.connect("/run/systemd/journal/socket")
sock.send("".join(f"{line}\\n" for line in sys.argv[1:]).encode())
"""


@pytest.fixture
def good(host_machine: PrivateSystemd, install: Install) -> Service:
    """One that others must not disturb."""
    host_machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
    return installed(host_machine, install, "innocent")


@pytest.fixture
def hostile(host_machine: PrivateSystemd, install: Install) -> Service:
    """One that means harm."""
    lines = ["RuntimeDirectory=hostile", "RuntimeDirectoryPreserve=restart", "Restart=no"]
    return install(host_machine, "hostile", "hostile", *lines)


def says(hostile: Service, how: str) -> None:
    hostile.inside("/run/hostile/says").write_text(how)


def lines_of(service: Service, *arguments: str, code: int = 0) -> list[str]:
    """What a command shows; it ends in time, and each line is one of ours."""
    began = time.monotonic()
    done = upgrader(service.machine, *arguments)
    took = time.monotonic() - began
    assert (code, True) == (done.returncode, took < FAR), (done.stdout, done.stderr, took)
    assert "unexpected" not in done.stderr
    found = done.stdout.splitlines()
    assert all(line.isprintable() for line in [*found, *done.stderr.splitlines()])
    return found


def test_a3_an_answer_byte_by_byte_and_sockets_that_are_silent(
    good: Service, hostile: Service
) -> None:
    """Nobody is kept waiting for longer than the deadlines of two questions."""
    hostile.environment(SILENT="12")
    hostile.restart()
    says(hostile, "drip")
    rows = lines_of(good, "list")
    found = [row.split()[:2] for row in rows]
    assert [good.unit, "serving"] in found
    assert [hostile.unit, "serving"] in found


def test_a4_a7_a8_answers_that_cannot_be_read_or_control_a_terminal(
    good: Service, hostile: Service
) -> None:
    """Each unit has one row, whatever another one says, and the hook goes on with the next."""
    for how in ("deep", "huge", "evil"):
        says(hostile, how)
        rows = lines_of(good, "list")
        assert [good.unit, "serving"] in [row.split()[:2] for row in rows]
        assert not [row for row in rows if row.startswith("zzz")]
        metrics = lines_of(good, "status", "--prometheus")
        assert f'upgrader_generation{{unit="{good.unit}"}} 1' in metrics
        assert all(line.startswith(("#", "upgrader_")) for line in metrics)
    assert not [row for row in lines_of(good, "status", hostile.unit) if row.startswith("zzz")]
    lines_of(good, "check", hostile.unit, code=1)
    said = hook(good.machine, hostile.unit, good.unit)
    assert f"{good.unit}: upgraded in" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_a5_a_bad_version_that_writes_what_is_no_number(hostile: Service) -> None:
    """It has failed, which is told, and leaves a hold as any other bad version does."""
    hostile.environment(MODE="dies")
    done = upgrader(hostile.machine, "upgrade", hostile.unit, "--mode", "restart", "--json")
    outcome = json.loads(done.stdout)
    assert (3, "not-serving") == (done.returncode, outcome["result"]), outcome
    assert "zzz.service" in outcome["cause"]
    assert done.stdout.rstrip("\n").isprintable()
    kept = hostile.inside(f"/var/lib/upgrader/hold/{hostile.unit}").read_text()
    assert "zzz.service" in json.loads(kept)["cause"]
    assert [] == [row for row in lines_of(hostile, "list") if row.startswith("zzz")]


def test_a6_a_history_that_anybody_has_written(good: Service) -> None:
    """It has what the unit and root have written, and nothing of a stranger."""
    lines_of(good, "upgrade", good.unit)
    forged = (
        f"MESSAGE_ID={MESSAGE_ID}", f"UPGRADER_UNIT={good.unit}", "UPGRADER_SIDE=source",
        "UPGRADER_PHASE=migrate", "UPGRADER_OUTCOME=failed", "MESSAGE=forged", "PRIORITY=3",
    )  # fmt: skip
    program = [*good.machine.python, "-c", _FORGED, *forged]
    good.machine.run([*NOBODY, *program])
    # Root is believed, and what is no number of an event makes it none.
    good.machine.run([*program, f"UPGRADER_FDS={'9' * 400}", "UPGRADER_SECONDS=nan"])
    good.machine.run(["journalctl", "--sync"])
    assert not [row for row in lines_of(good, "history", good.unit) if "forged" in row]
    events = json.loads("".join(lines_of(good, "history", good.unit, "--json")))
    assert {"source", "destination"} <= {event["side"] for event in events}
    assert {"done"} == {event["outcome"] for event in events}
