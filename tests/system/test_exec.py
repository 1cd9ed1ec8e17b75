# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mode exec under a real systemd: the process becomes its new version, and what if that fails."""

import shlex

import pytest

from tests.system.reloading import installed
from tests.system.serving import Client, Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin


def execute(service: Service, *more: str) -> dict[str, object]:
    return upgrade(service, "--mode", "exec", *more)


def holder(service: Service, mode: str) -> str:
    """A command line of another version of the program."""
    python = shlex.join(service.machine.python)
    return f"/usr/bin/env MODE={mode} {python} /opt/upgrader-tests/holder.py"


@pytest.mark.parametrize("program", ["holder", "blocking"])
def test_the_process_stays(any_machine: PrivateSystemd, install: Install, program: str) -> None:
    """Three times the same process, connections, state and half a line; then live, a restart and a
    stop work as ever, and nothing is left in the FD store."""
    service = installed(any_machine, install, "same", program=program)
    before, stored = service.pid, service.stored
    with service.clients(3) as clients:
        for client in clients:
            client.add()
        for generation in (2, 3, 4):
            clients[0].send("ad")
            said = execute(service)
            assert ("done", "exec") == (said["result"], said["mode"]), said
            assert (before, stored) == (service.pid, service.stored)
            assert Origin.EXEC is service.status.origin
            clients[0].send("d\n")
            count, _, seen = map(int, clients[0].line().split())
            assert (generation, generation) == (count, seen)
        assert "done" == upgrade(service)["result"]
        assert before != service.pid
        service.restart()
        assert {6} == {seen for _, _, seen in map(Client.add, clients)}
        service.stop()
        assert all(client.line() in ("goodbye", "") for client in clients)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("/usr/bin/no-such-program", "there is no such file"),
        ("/etc/hostname", "not executable"),
        ("/srv/no-program", "Exec format error"),
    ],
)
def test_what_cannot_be_executed_changes_nothing(
    host_machine: PrivateSystemd, install: Install, command: str, reason: str
) -> None:
    """Refused before anything is disturbed, or taken back in the very last step."""
    service = installed(host_machine, install, "stays")
    host_machine.write("/srv/no-program", "neither a script nor a binary", mode=0o755)
    with service.connect() as client:
        client.add()
        before, stored = service.pid, service.stored
        client.send("ad")

        said = execute(service, "--exec-command", command)

        assert ("failed-old-serves", 1) == (said["result"], said["exit_code"])
        assert reason in str(said["cause"])
        client.send("d\n")
        assert "2 2 1" == client.line()
        assert (before, stored) == (service.pid, service.stored)
        assert "done" == upgrade(service)["result"]
        assert (3, 3, 2) == client.add()


@pytest.mark.parametrize(("mode", "reason"), [("refusing", "not with me"), ("exit", "ended")])
def test_a_bad_version_is_replaced_by_restart(
    any_machine: PrivateSystemd, install: Install, mode: str, reason: str
) -> None:
    """It ends, Restart= starts what ExecStart= says, and that loads PID 1's copy of the image."""
    service = installed(any_machine, install, "replaced")
    with service.connect() as client:
        client.add()
        client.send("ad")

        said = execute(service, "--exec-command", holder(service, mode))

        assert ("failed-old-serves", 1) == (said["result"], said["exit_code"]), said
        assert reason in str(said["cause"])
        client.send("d\n")
        assert "2 2 2" == client.line()
        assert Origin.RESTART is service.status.origin


def test_what_does_not_move_is_answered_first(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """With backend-transfer off, a connection ends what it is at before the process is another."""
    off = "Environment=UPGRADER_BACKEND_TRANSFER=no"
    service = installed(host_machine, install, "kept-back", off)
    with service.connect() as client:
        client.add()
        client.send("busy 0.5\n")

        assert "done" == execute(service)["result"]

        assert ["done", "goodbye", ""] == [client.line() for _ in range(3)]
    with service.connect() as client:
        assert (1, 2, 2) == client.add()


def test_the_wrong_mode(host_machine: PrivateSystemd, install: Install) -> None:
    """--exec-command belongs to one mode only."""
    service = installed(host_machine, install, "wrong")
    done = host_machine.run(
        ["upgrader", "upgrade", service.unit, "--exec-command", "/bin/true"], check=False
    )
    assert 2 == done.returncode
    assert "--mode exec" in done.stderr
