# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units and jobs over D-Bus, against the real PID 1 of each release."""

import json
import textwrap
from typing import Any

from upgrader.private_systemd import PrivateSystemd

UNIT = """
[Unit]
Description=to be asked about
[Service]
Type=exec
ExecStart=sleep infinity
FileDescriptorStoreMax=7
Environment=A=1 "B=two words"
"""


def ask(machine: PrivateSystemd, code: str) -> Any:
    """Run code inside that has a connection `systemd` and leaves its findings in `found`."""
    machine.write("/run/systemd/system/asked.service", UNIT)
    machine.run(["ln", "-sf", "asked.service", "/run/systemd/system/alias.service"])
    machine.run(["systemctl", "daemon-reload"])
    begin = "import json\nfrom upgrader.systemd.units import *\nfound = {}\n"
    body = f"with Systemd() as systemd:\n{textwrap.indent(textwrap.dedent(code), '    ')}\n"
    text = f"{begin}{body}print(json.dumps(found))"
    try:
        return json.loads(machine.run([*machine.python, "-c", text]).stdout)
    finally:
        machine.run(["systemctl", "stop", "asked.service"])
        machine.run(["rm", "-f", "/run/systemd/system/alias.service"])
        machine.run(["rm", "-f", "/run/systemd/system/asked.service"])
        machine.run(["systemctl", "daemon-reload"])


def test_a_unit_is_what_systemctl_says(any_machine: PrivateSystemd) -> None:
    """Values read over D-Bus are systemd's, through an alias, and None without a setting."""
    found = ask(
        any_machine,
        """
        unit = systemd.unit("alias")
        found = {name: getattr(unit, name) for name in (
            "id", "load_state", "active_state", "type", "fd_store_max",
            "fd_store_preserve", "environment", "fragment_path", "need_daemon_reload", "job_id",
            "restart", "stored_fds", "invocation_id", "serves", "settled")}
        found["names"] = sorted(unit.names)
        found["release"] = systemd.release
        """,
    )
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


def test_jobs_are_waited_for_by_signals(any_machine: PrivateSystemd) -> None:
    """Start, restart and stop give a job, its end is waited for, and the unit has changed."""
    found = ask(
        any_machine,
        """
        found["states"] = []
        for submit in (systemd.start, systemd.restart, systemd.stop):
            unit = systemd.unit("asked")
            word = systemd.wait_job(unit, submit(unit), timeout=30)
            unit = systemd.unit("asked")
            found["states"].append((word, unit.active_state, unit.main_pid > 0))
        """,
    )

    assert found["states"] == [
        ["done", "active", True],
        ["done", "active", True],
        ["done", "inactive", False],
    ]


def test_waiting_ends_with_its_time(any_machine: PrivateSystemd) -> None:
    """Where nothing happens, waiting raises WaitTimeout after the time given."""
    found = ask(
        any_machine,
        """
        try:
            systemd.wait_job(systemd.unit("asked"), 1, timeout=0.1)
        except WaitTimeout as error:
            found = {"unit": error.unit, "seconds": error.seconds}
        """,
    )

    assert found == {"unit": "asked.service", "seconds": 0.1}


def test_a_masked_unit_is_refused_in_systemd_s_words(any_machine: PrivateSystemd) -> None:
    """What PID 1 refuses is told in its own words, with the unit and the operation."""
    any_machine.run(["systemctl", "mask", "--runtime", "never.service"])
    found = ask(
        any_machine,
        """
        try:
            systemd.start(systemd.unit("never"))
        except JobRefused as error:
            found = {"unit": error.unit, "operation": error.operation, "reason": error.reason}
        """,
    )
    any_machine.run(["systemctl", "unmask", "--runtime", "never.service"])

    assert found["unit"] == "never.service"
    assert found["operation"] == "start it"
    assert "masked" in found["reason"]


def test_a_lost_connection_is_an_error_of_ours(any_machine: PrivateSystemd) -> None:
    """When the bus goes away in the middle of a wait, BusUnreachable is raised, at once."""
    found = ask(
        any_machine,
        """
        import subprocess
        unit = systemd.unit("asked")
        systemd.watch(unit)
        subprocess.run(["systemctl", "kill", "-s", "KILL", "dbus.service"], check=True)
        try:
            systemd.wait_job(unit, 1, timeout=30)
        except BusUnreachable as error:
            found = {"unit": error.unit, "reason": error.reason}
        """,
    )

    assert found["unit"] == "asked.service"
    assert found["reason"] == "Connection reset by peer"


def test_both_ways_of_asking_say_the_same(any_machine: PrivateSystemd) -> None:
    """The library, which has no D-Bus package, reads what pystemd reads: a unit and its sockets."""
    any_machine.write(
        "/run/systemd/system/asked.socket",
        "[Socket]\nListenStream=7000\nListenDatagram=/run/asked\nFileDescriptorName=door\n",
    )
    found = ask(
        any_machine,
        """
        import subprocess
        from upgrader.systemd.bus import Bus
        subprocess.run(["systemctl", "start", "asked.socket"], check=True)
        unit = systemd.unit("asked")
        sockets = systemd.sockets(unit)
        with Bus(10) as bus:
            again = Unit.from_properties(unit.path, bus.properties(unit.id))
            others = tuple(
                SocketUnit.from_properties(bus.properties(name)) for name in again.triggered_by
            )
        found = {
            "same": unit == again and sockets == others,
            "start": unit.exec_start[0].arguments,
            "limits": [unit.kill_mode, unit.oom_policy, unit.uid, unit.user],
            "sockets": [[s.id, s.active, s.name, s.listens] for s in sockets],
        }
        """,
    )
    any_machine.run(["systemctl", "stop", "asked.socket"])
    any_machine.run(["rm", "/run/systemd/system/asked.socket"])
    any_machine.run(["systemctl", "daemon-reload"])

    assert found == {
        "same": True,
        "start": ["sleep", "infinity"],
        "limits": ["control-group", "stop", 2**32 - 1, ""],
        "sockets": [
            ["asked.socket", True, "door", [["Stream", "[::]:7000"], ["Datagram", "/run/asked"]]]
        ],
    }
