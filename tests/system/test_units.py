# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units and jobs over D-Bus, against the real PID 1 of each release."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.system.serving import PROGRAMS
from upgrader.lab.private_systemd import PrivateSystemd

UNIT = """
[Unit]
Description=to be asked about
[Service]
Type=exec
ExecStart=sleep infinity
FileDescriptorStoreMax=7
Environment=A=1 "B=two words"
"""
SOCKET = """
[Socket]
ListenStream=7000
ListenDatagram=/run/asked
FileDescriptorName=door
"""
Ask = Callable[[str], Any]


@pytest.fixture
def ask(any_machine: PrivateSystemd) -> Iterator[Ask]:
    """Asks a question of services/asking.py inside, about a unit that has an alias and a socket."""
    machine = any_machine
    place = "/run/systemd/system"
    machine.write(f"{place}/asked.service", UNIT)
    machine.write(f"{place}/asked.socket", SOCKET)
    machine.run(["ln", "-sf", "asked.service", f"{place}/alias.service"])
    machine.run(["systemctl", "mask", "--runtime", "never.service"])
    machine.run(["systemctl", "daemon-reload"])
    machine.copy_in(PROGRAMS / "asking.py", "/srv/asking.py")

    def answer(question: str) -> Any:
        return json.loads(machine.run([*machine.python, "/srv/asking.py", question]).stdout)

    yield answer
    machine.run(["systemctl", "stop", "asked.socket", "asked.service"])
    machine.run(["systemctl", "unmask", "--runtime", "never.service"])
    machine.run(
        ["rm", *(f"{place}/{name}" for name in ("alias.service", "asked.service", "asked.socket"))]
    )
    machine.run(["systemctl", "daemon-reload"])


def test_a_unit_is_what_systemctl_says(any_machine: PrivateSystemd, ask: Ask) -> None:
    """Values read over D-Bus are systemd's, through an alias, and None without a setting."""
    found = ask("properties")
    newer = any_machine.systemd_version >= 254

    assert found == {
        "id": "asked.service",
        "names": ["alias.service", "asked.service"],
        "load_state": "loaded",
        "active_state": "inactive",
        "type": "exec",
        "fd_store_max": 7,
        "fd_store_preserve": "restart" if newer else None,
        "environment": ["A=1", "B=two words"],
        "fragment_path": "/run/systemd/system/asked.service",
        "need_daemon_reload": False,
        "job_id": 0,
        "restart": "no",
        "stored_fds": 0,
        "invocation_id": "",
        "serves": False,
        "settled": True,
        "release": any_machine.systemd_version,
    }


def test_jobs_are_waited_for_by_signals(ask: Ask) -> None:
    """Start, restart and stop give a job, its end is waited for, and the unit has changed."""
    found = ask("jobs")

    assert found["states"] == [
        ["done", "active", True],
        ["done", "active", True],
        ["done", "inactive", False],
    ]


def test_waiting_ends_with_its_time(ask: Ask) -> None:
    """Where nothing happens, waiting raises WaitTimeout after the time given."""
    found = ask("nothing")

    assert found == {"unit": "asked.service", "seconds": 0.1}


def test_a_masked_unit_is_refused_in_systemd_s_words(ask: Ask) -> None:
    """What PID 1 refuses is told in its own words, with the unit and the operation."""
    found = ask("masked")

    assert found["unit"] == "never.service"
    assert found["operation"] == "start it"
    assert "masked" in found["reason"]


def test_a_lost_connection_is_an_error_of_ours(ask: Ask) -> None:
    """When the bus goes away in the middle of a wait, BusUnreachable is raised, at once."""
    found = ask("lost")

    assert found["unit"] == "asked.service"
    assert found["reason"] == "Connection reset by peer"


def test_both_ways_of_asking_say_the_same(ask: Ask) -> None:
    """The library, which has no D-Bus package, reads what pystemd reads: a unit and its sockets."""
    found = ask("both")

    assert found == {
        "same": True,
        "start": ["sleep", "infinity"],
        "limits": ["control-group", "stop", 2**32 - 1, ""],
        "sockets": [
            ["asked.socket", True, "door", [["Stream", "[::]:7000"], ["Datagram", "/run/asked"]]]
        ],
    }
