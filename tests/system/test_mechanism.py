# SPDX-License-Identifier: LGPL-2.1-or-later
"""backend-transfer-mechanism=fd-store under a real systemd: every FD under its own name, for programs
that know only LISTEN_FDS too."""

from tests.support import eventually
from tests.system.reloading import live, reload, socket_there
from tests.system.serving import PROGRAMS, Install
from tests.system.tool import found, status, upgrader
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

STORE = "Environment=UPGRADER_BACKEND_TRANSFER_MECHANISM=fd-store"


def test_restarts_by_the_fd_store(any_machine: PrivateSystemd, install: Install) -> None:
    """Connections, state and listener cross restart after restart, and the store grows not; a bad
    version changes nothing, and the good one loads the same image."""
    more = [*live(any_machine, "spread"), STORE]
    service = install(any_machine, "spread", "holder", *more)
    with service.clients(3) as clients:
        for generation in (1, 2, 3):
            answers = [client.add() for client in clients]
            assert {(generation, generation)} == {(count, seen) for count, _, seen in answers}
            before = service.stored
            service.restart()
            assert (Origin.RESTART, 0) == (service.status.origin, service.status.left_behind)
            assert before == service.stored
        assert [10, 11, 12] == [client.add()[1] for client in clients]
        service.environment(MODE="refusing")
        service.restart(check=False)
        service.until(ActiveState="activating", SubState="auto-restart")
        if any_machine.systemd_version >= 254:
            names = service.stored_names
            assert {"upgrader-listener-door", "upgrader-image-4", "upgrader-ledger-4"} < names
            assert {f"upgrader-entry-4.{index}" for index in (1, 2, 3)} < names
        service.environment()
        service.restart()
        assert {(5, 5)} == {(count, seen) for count, _, seen in (c.add() for c in clients)}


def test_a_store_without_room(any_machine: PrivateSystemd, install: Install) -> None:
    """What does not fit one by one crosses on a channel, and that is said."""
    more = [*live(any_machine, "narrow"), STORE, "FileDescriptorStoreMax=4"]
    service = install(any_machine, "narrow", "holder", *more)
    with service.clients(3) as clients:
        assert {1} == {client.add()[0] for client in clients}
        service.restart()
        assert {2} == {client.add()[0] for client in clients}
    assert "has room for 3 of 5 FDs" in service.messages()


def test_an_image_that_no_version_loads(any_machine: PrivateSystemd, install: Install) -> None:
    """After so many tries it is set aside, and nothing of it but its state stays in the store."""
    more = [*live(any_machine, "poison"), STORE, "Environment=UPGRADER_LOAD_ATTEMPTS=2"]
    service = install(any_machine, "poison", "holder", *more)
    with service.connect() as client:
        client.add()
        service.environment(MODE="unreadable")
        service.restart(check=False)
        assert "" == client.line()
    service.until(ActiveState="active")
    assert 1 == service.status.set_aside
    assert 2 == service.stored  # the listener, and what was set aside


def test_it_is_not_live(any_machine: PrivateSystemd, install: Install) -> None:
    """PID 1 gives the FD store to a start only: an upgrade is by a restart and says why, `--mode
    live` and a bare reload refuse before anything is disturbed, and `check` knows."""
    more = [*live(any_machine, "stored"), STORE]
    service = install(any_machine, "stored", "holder", *more)
    assert socket_there(service)
    report = found(service)
    assert "restart" == report["mode"]
    assert any("works by a restart" in each["what"] for each in report["findings"])
    before = service.pid
    service.environment(ROUND="2")
    assert not reload(service)
    done = upgrader(any_machine, "upgrade", "--mode", "live", service.unit)
    assert (1, before) == (done.returncode, service.pid)
    assert status(service)["hold"] is None
    done = upgrader(any_machine, "upgrade", service.unit)
    assert (0, Origin.RESTART) == (done.returncode, service.status.origin), done.stderr
    assert "not live but by a restart: backend-transfer-mechanism=fd-store" in done.stderr


def test_a_program_that_knows_only_listen_fds(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """It takes over from ours and gives back to ours, with one listener throughout: no client is
    ever refused."""
    more = [
        *live(any_machine, "unmodified"),
        STORE,
        "Environment=UPGRADER_BACKEND_TRANSFER=no",
    ]
    service = install(any_machine, "unmodified", "unmodified", *more)

    def inode() -> int:
        with service.connect() as client:
            return int(client.line().split()[1])

    first = inode()
    any_machine.copy_in(PROGRAMS / "holder.py", "/opt/upgrader-tests/holder.py")
    ours = f"ExecStart={' '.join(any_machine.python)} /opt/upgrader-tests/holder.py"
    service.configure(*more, "ExecStart=", ours)
    service.restart()
    assert socket_there(service)
    assert eventually(lambda: status(service)["instance"] is not None)
    assert [first] == [each["inode"] for each in status(service)["instance"]["backends"]]
    with service.connect() as client:
        assert 1 == client.add()[2]
    service.configure(*more)
    service.restart()
    assert first == inode()
