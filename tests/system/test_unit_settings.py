# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units that leave something out, and hardened ones: a restart loses nothing, or says what."""

import socket
from pathlib import Path

import pytest

from tests.support import eventually
from tests.system.serving import Client, Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

HARDENED = (
    "DynamicUser=yes",
    f"BindReadOnlyPaths=-{Path(__file__).parents[2]}",  # a private /tmp would hide a checkout there
    "ProtectSystem=strict",
    "ProtectHome=read-only",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "PrivateUsers=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "ProtectKernelTunables=yes",
    "ProtectControlGroups=yes",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "MemoryDenyWriteExecute=yes",
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
    "StateDirectory=hardened",
    "RuntimeDirectory=hardened",
)


def test_a_hardened_unit(any_machine: PrivateSystemd, install: Install) -> None:
    """With all that hardens a unit, connections and state cross a restart all the same."""
    service = install(any_machine, "hardened", "holder", *HARDENED)
    with service.connect() as client:
        client.add()
        service.restart()

        assert (2, 2, 2) == client.add()
        service.environment(MODE="refusing")
        service.restart(check=False)
        service.environment()
        service.until(ActiveState="active")

        assert (3, 3, 3) == client.add()
    assert 1 == service.stored
    assert 0 == service.status.left_behind
    assert "failed to load: VerifyError" in service.messages("UPGRADER_OUTCOME=failed")


@pytest.mark.parametrize("user", ["root", "daemon"])
@pytest.mark.parametrize("room", [0, 1])
def test_no_room_in_the_fd_store(
    any_machine: PrivateSystemd, install: Install, room: int, user: str
) -> None:
    """Where the FD store does not take the image, this is an error in the journal that names the
    setting, and the connections are drained: nothing is lost in silence."""
    more = (f"FileDescriptorStoreMax={room}", f"User={user}")
    service = install(any_machine, f"crammed-{room}-{user}", "holder", *more)
    with service.connect() as client:
        client.add()
        service.restart()

        assert ["goodbye", ""] == [client.line(), client.line()]
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
    (said,) = service.journal("PRIORITY=3", "UPGRADER_SIDE=source", "UPGRADER_PHASE=park")
    assert "nothing could be parked, draining instead" in said["MESSAGE"]
    assert "FileDescriptorStoreMax=" in said["MESSAGE"]
    assert room == service.stored


def test_a_unit_that_does_not_listen(any_machine: PrivateSystemd, install: Install) -> None:
    """Without NOTIFY_SOCKET nothing can be parked: the journal says so at the start, and a
    restart drains."""
    service = install(
        any_machine, "deaf", "holder", "Type=exec", "NotifyAccess=none", "FileDescriptorStoreMax=0"
    )
    assert eventually(lambda: _listens(service))
    with service.connect() as client:
        client.add()
        service.restart()

        assert ["goodbye", ""] == [client.line(), client.line()]
    assert "WARNING holder: systemd gives it no NOTIFY_SOCKET" in service.messages()


def _listens(service: Service) -> bool:
    try:
        service.connect().close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_socket_file_that_vanishes(any_machine: PrivateSystemd, install: Install) -> None:
    """RuntimeDirectory= takes the path of a UNIX listener away at a restart; clients can connect
    after it, and the connections of before have moved."""
    path = "/run/vanishing/door"
    service = install(
        any_machine,
        "vanishing",
        "holder",
        "RuntimeDirectory=vanishing",
        f"Environment=BIND=unix:{path}",
    )

    def connect() -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(service.inside(path)))
        return Client(sock)

    with connect() as client:
        client.add()
        for generation in (2, 3):
            service.restart()

            assert (generation, generation) == client.add()[::2]
            with connect() as other:
                assert (1, generation) == other.add()[::2]
    assert 1 == service.stored


def test_a_socket_file_that_is_kept(any_machine: PrivateSystemd, install: Install) -> None:
    """With RuntimeDirectoryPreserve=restart the path stays, so that a client that connects while
    nobody runs is served after."""
    path = "/run/keeping/door"
    service = install(
        any_machine,
        "keeping",
        "holder",
        "RuntimeDirectory=keeping",
        "RuntimeDirectoryPreserve=restart",
        f"Environment=BIND=unix:{path}",
        "RestartSec=200ms",
    )
    inode = service.inside(path).stat().st_ino
    service.environment(MODE="exit")
    service.restart(check=False)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(service.inside(path)))
        service.environment()

        assert "1 1 2" == Client(sock).ask("add")
    assert inode == service.inside(path).stat().st_ino
    assert 1 == service.stored


def test_a_unit_with_a_name_to_escape(any_machine: PrivateSystemd, install: Install) -> None:
    """An instance of a template, in a slice and with a cgroup of its own, finds out what stops it."""
    service = install(
        any_machine, "1-deep:er@one-two", "holder", "Delegate=yes", "Slice=deep-down.slice"
    )
    with service.connect() as client:
        client.add()
        service.restart()
        assert (2, 2, 2) == client.add()
        service.stop()

        assert "goodbye" == client.line()
    assert 0 == service.stored


def test_a_pid_namespace_of_its_own(sid_machine: PrivateSystemd, install: Install) -> None:
    """With PrivatePIDs=, where the instance is process 1, a restart moves everything. (257 takes
    such a process for somebody else's child, and kills it without a SIGTERM.)"""
    service = install(sid_machine, "alone", "holder", "PrivatePIDs=yes")
    with service.connect() as client:
        client.add()
        service.restart()

        assert (2, 2, 2) == client.add()
    assert 1 == service.stored


def test_drain_timeout_beyond_the_stop_timeout(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """A drain-timeout longer than TimeoutStopSec= does not get the source killed with all it has."""
    service = install(
        any_machine,
        "hasty",
        "holder",
        "TimeoutStopSec=1",
        "Environment=UPGRADER_DRAIN_TIMEOUT=1h",
    )
    with service.connect() as busy, service.connect() as idle:
        busy.send("busy 3600\n")
        idle.add()
        service.restart()

        assert (2, 2, 2) == idle.add()
        assert "" == busy.line()
    assert 1 == service.status.left_behind


def test_another_address(any_machine: PrivateSystemd, install: Install) -> None:
    """A version that binds another address gets the connections of the old one, and who still
    waited there; new clients come to the new address, and are refused at the old one."""
    service = install(any_machine, "moved", "holder", "RestartSec=200ms")
    old, new = service.port, service.port + 10_000
    with service.connect() as client:
        client.add()
        service.environment(MODE="exit")
        service.restart(check=False)
        with service.connect() as waiting:
            waiting.send("add\n")
            service.environment(BIND=f"127.0.0.1:{new}")
            service.until(ActiveState="active")

            assert "1" == waiting.line().split()[0]
        assert (2, 2) == client.add()[::2]
        with pytest.raises(ConnectionRefusedError):
            service.connect()
        service.port = new
        for generation in (2, 3):
            with service.connect() as other:
                assert (1, generation) == other.add()[::2]
            service.restart()
        service.port = old
    assert 1 == service.stored
