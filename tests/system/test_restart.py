# SPDX-License-Identifier: LGPL-2.1-or-later
"""`systemctl restart` of a real service: what was there before is there after."""

import socket
import struct

import pytest

from tests.support import eventually
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

PROGRAMS = ["holder", "blocking"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_connections_and_state_move(
    any_machine: PrivateSystemd, install: Install, program: str
) -> None:
    """Connections, what belongs to each, and the state of all go on where they were."""
    service = install(any_machine, f"moving-{program}", program)
    with service.connect() as first, service.connect() as second:
        first.add()
        second.add()
        second.add()
        service.restart()

        assert (2, 4, 2) == first.add()
        assert (3, 5, 2) == second.add()
    status = service.status
    assert (2, Origin.RESTART, 1, 3, 0) == (
        status.generation,
        status.origin,
        status.source_generation,
        status.fds,
        status.left_behind,
    )
    assert 1 == service.stored


@pytest.mark.parametrize("program", PROGRAMS)
def test_requests_split_by_a_restart(
    any_machine: PrivateSystemd, install: Install, program: str
) -> None:
    """Half a request sent before and half after the restart is answered once; so is one in whole
    that was sent while nobody ran."""
    service = install(any_machine, f"split-{program}", program)
    with service.connect() as half, service.connect() as whole:
        half.add()
        whole.add()
        half.send("add\nad")  # the answer to the first says that the half has come as well
        assert "2 3 1" == half.line()
        service.environment(MODE="exit")
        service.restart(check=False)
        whole.send("add\nadd\n")
        service.environment()
        service.start()
        half.send("d\n")

        assert ["2", "3"] == [whole.line().split()[0] for _ in range(2)]
        assert "3" == half.line().split()[0]
        assert 7 == half.add()[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_response_half_written(
    any_machine: PrivateSystemd, install: Install, program: str
) -> None:
    """What the service has written and the client has not read yet arrives once and whole."""
    size = 12_000_000  # more than the socket buffers of both sides take
    service = install(any_machine, f"unsent-{program}", program)
    with service.connect() as slow:
        slow.send(f"big {size}\n")
        begun = slow.sock.recv(1)
        service.restart()
        rest = slow.line()

        assert size == len(begun) + len(rest)
        assert {"x"} == set(rest)
        assert (1, 1, 2) == slow.add()


def test_a_busy_handler_is_waited_for(any_machine: PrivateSystemd, install: Install) -> None:
    """A request in the middle of its work is finished and answered before the freeze."""
    service = install(any_machine, "busy", "holder")
    with service.connect() as client:
        client.send("busy 0.5\n")
        service.restart()

        assert "done" == client.line()
        assert (1, 1, 2) == client.add()
    assert 0 == service.status.left_behind


def test_a_handler_that_stays_busy_is_cut_and_named(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """After drain-timeout a busy connection is cut, counted and named; the others move."""
    service = install(any_machine, "stuck", "holder", "Environment=UPGRADER_DRAIN_TIMEOUT=200ms")
    with service.connect() as stuck, service.connect() as idle:
        idle.add()
        stuck.send("busy 3600\n")
        assert (2, 2, 1) == idle.add()  # and so the other request has come, too
        service.restart()

        assert "" == stuck.line()
        assert (3, 3, 2) == idle.add()
        named = stuck.sock.getsockname()
    assert 1 == service.status.left_behind
    assert f"{named[0]}:{named[1]} of 'door': its handler is busy" in service.messages()


def settled_fds(service: Service) -> tuple[int, int, int]:
    """FDs of the service, of PID 1 and in the FD store, once nothing more is closed: PID 1 ends a
    connection some time after its client."""
    seen: list[tuple[int, int, int]] = []

    def settled() -> bool:
        counted = service.open_fds(service.pid), service.open_fds(1), service.stored
        seen.append(counted)
        return seen[-5:] == [counted] * 5

    assert eventually(settled), seen
    return seen[-1]


def test_no_fd_leaks(any_machine: PrivateSystemd, install: Install) -> None:
    """Service, PID 1 and FD store have as many FDs after 50 restarts as after 2."""
    service = install(any_machine, "leaking", "holder")
    counted = []
    with service.clients(10) as clients:
        for number in range(1, 51):
            service.restart()
            if number in (2, 50):
                assert {number + 1} == {client.add()[2] for client in clients}
                counted.append(settled_fds(service))

    print(f"{any_machine.tree.name}: FDs of service, PID 1, store: {counted}")
    assert counted[0] == counted[1]
    assert 1 == counted[0][2]


def test_clients_that_leave_meanwhile(any_machine: PrivateSystemd, install: Install) -> None:
    """Connections that were closed or reset while nobody ran do not keep the others from moving."""
    service = install(any_machine, "left", "holder")
    reset = struct.pack("ii", 1, 0)
    with service.clients(30) as clients:
        for client in clients:
            client.add()
        service.environment(MODE="exit")
        service.restart(check=False)
        for client in clients[:10]:
            client.close()
        for client in clients[10:20]:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.close()
        service.environment()
        service.until(ActiveState="active")

        assert {(2, 2)} == {client.add()[::2] for client in clients[20:]}
    assert 31 == service.status.fds


def test_restarts_one_on_top_of_the_other(any_machine: PrivateSystemd, install: Install) -> None:
    """A restart that comes while the instance before is still starting loses nothing."""
    service = install(any_machine, "storm", "holder")
    with service.clients(200) as clients:
        for client in clients:
            client.add()
        for _ in range(30):
            any_machine.run(["systemctl", "restart", "--no-block", service.unit])
        service.restart()

        assert {2} == {client.add()[0] for client in clients}
        with service.connect() as last:
            assert 401 == last.add()[1]
    assert 1 == service.stored


_SOCKET = """\
[Socket]
ListenStream=127.0.0.1:{port}
FileDescriptorName=door
"""


def test_a_socket_unit(any_machine: PrivateSystemd, install: Install) -> None:
    """With a listener of PID 1 connections move just the same, and nothing stays in the store."""
    service = install(any_machine, "activated", "holder")
    service.stop()
    text = _SOCKET.format(port=service.port)
    any_machine.write("/etc/systemd/system/activated.socket", text)
    any_machine.run(["systemctl", "daemon-reload"])
    any_machine.run(["systemctl", "start", "activated.socket"])
    try:
        with service.connect() as client:
            client.add()
            for generation in (2, 3):
                service.restart()
                assert (generation, generation) == client.add()[::2]
                assert 0 == service.stored
                with service.connect() as other:
                    other.add()
    finally:
        any_machine.run(["systemctl", "stop", "activated.socket"])
        any_machine.run(["rm", "/etc/systemd/system/activated.socket"])
