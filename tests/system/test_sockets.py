# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several sockets of one name, another address on the same port, and FDs that nobody declared: under a
real systemd, in every mode."""

import socket

import pytest

from tests.support import eventually
from tests.system.reloading import installed, live
from tests.system.serving import Client, Install, Service, network_of
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

MODES = ["live", "exec", "restart", "live"]


def connect(service: Service, host: str) -> Client:
    with network_of(service.machine):
        return Client(socket.create_connection((host, service.port), 30))


def reaches(service: Service, host: str) -> bool:
    try:
        connect(service, host).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def passed(any_machine: PrivateSystemd, install: Install) -> Service:
    """A service with a .socket that has two lines of one name, and a file where systemd opens any."""
    machine, name = any_machine, "several"
    opens = machine.systemd_version >= 253
    more = ["OpenFile=/etc/several:host:read-only"] if opens else []
    machine.write("/etc/several", "here\n")
    lines = f"ListenStream=/run/{name}.1\nListenStream=/run/{name}.2\nFileDescriptorName=door\n"
    machine.write(f"/etc/systemd/system/{name}.socket", f"[Socket]\n{lines}")
    more.append(f"Environment=BIND=unix:/run/{name}.own")  # until its .socket is started
    return install(machine, name, "several", *live(machine, name), *more)


def test_u1_u7_what_is_passed_serves_or_moves_along(passed: Service) -> None:
    """All sockets of the name serve; a file of OpenFile= and what the program keeps stay its own."""
    machine = passed.machine
    passed.stop()
    machine.run(["systemctl", "start", "several.socket", passed.unit])
    host = "host=here " if machine.systemd_version >= 253 else ""

    def client(number: int) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(passed.inside(f"/run/several.{number}")))
        return Client(sock)

    try:
        with client(1) as first, client(2) as second:
            assert (1, 1, 1) == first.add()
            assert (2, 2, 1) == second.add()
            assert "kept" == first.ask("keep precious")
            for generation, mode in enumerate(MODES, 2):
                said = upgrade(passed, "--mode", mode)
                assert ("done", mode) == (said["result"], said["mode"]), said
                for number in (1, 2):
                    with client(number) as newcomer:
                        assert generation == newcomer.add()[2], mode
                        assert f"{host}own=precious" == newcomer.ask("passed"), mode
                assert first.add()[0] + 1 == second.add()[0]
        passed.signal("SIGKILL")
        for number in (1, 2):
            with client(number) as newcomer:
                assert f"{host}own=precious" == newcomer.ask("passed")
    finally:
        machine.run(["systemctl", "stop", passed.unit, "several.socket"], check=False)
        machine.run(["rm", "-f", "/etc/systemd/system/several.socket"])


def test_u2_another_address_on_the_same_port(any_machine: PrivateSystemd, install: Install) -> None:
    """Who is connected stays, and the new address is there, in every mode and direction."""
    service = installed(any_machine, install, "moved")
    port = service.port
    hosts = ["0.0.0.0", "127.0.0.1", "", "127.0.0.1", "0.0.0.0"]
    with connect(service, "127.0.0.1") as client:
        client.add()
        # In mode exec the process goes on with its own environment.
        for host, mode in zip(hosts, ["live", "restart", "live", "restart", "live"], strict=True):
            service.environment(BIND=f"{host}:{port}")
            said = upgrade(service, "--mode", mode)
            assert ("done", mode) == (said["result"], said["mode"]), said
            with connect(service, "127.0.0.1") as newcomer:
                assert client.add()[2] == newcomer.add()[2]
            assert (host != "127.0.0.1") == reaches(service, "127.0.0.2"), host
            assert (host == "") == reaches(service, "::1"), host


def test_u2_a_version_that_fails_leaves_the_address(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """Live: somebody else has it, and the source serves on where it was, old and new clients."""
    service = installed(host_machine, install, "left")
    with connect(service, "127.0.0.1") as client, network_of(host_machine):
        taken = socket.create_server(("127.0.0.2", service.port))
        with taken:
            assert (1, 1, 1) == client.add()
            service.environment(BIND=f"0.0.0.0:{service.port}")
            said = upgrade(service, "--mode", "live")
            assert "failed-old-serves" == said["result"]
            assert "cannot bind 0.0.0.0" in said["cause"]
            assert (2, 2, 1) == client.add()
            with connect(service, "127.0.0.1") as newcomer:
                assert (1, 3, 1) == newcomer.add()
        assert "done" == upgrade(service, "--mode", "live")["result"]
        assert (3, 4, 2) == client.add()


STORES = """\
import os
from upgrader.protocol.fd import Fd
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.notify import Notifier
store = FdStore(Notifier.from_environment(os.environ))
store.push(StoreName(Stored.LISTENER, "door"), Fd(os.open("/etc/hostname", os.O_RDONLY)))
"""


def kill(service: Service) -> None:
    pid = service.pid
    service.signal("KILL")
    assert eventually(lambda: service.pid not in (0, pid) and service.answers())


def test_a_file_under_the_name_of_a_listener(
    trixie_machine: PrivateSystemd, install: Install
) -> None:
    """Another program of the unit stores it before each start: it is named and kept aside, the newest of
    them, and the service starts, with its own listener after a crash."""
    machine, name = trixie_machine, "rudestore"
    machine.write("/run/stores.py", STORES)
    before = f"ExecStartPre={' '.join(machine.python)} /run/stores.py"
    service = install(machine, name, "holder", *live(machine, name), before)
    with service.connect() as client:
        assert 1 == client.add()[0]
    for again in (kill, Service.restart, kill):
        again(service)
        with service.connect() as client:
            assert 1 == client.add()[0]
    assert "upgrader-listener-door in the FD store is none of ours" in service.messages()
    assert 2 == service.stored
    if machine.systemd_version >= 254:
        wanted = {"upgrader-aside-listener-door", "upgrader-listener-door"}
        assert wanted < service.stored_names
