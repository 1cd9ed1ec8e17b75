# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an instance ends decides what stays: stop, restart, soft-reboot, signals by hand, kills."""

import contextlib
import threading
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin


def test_stop_leaves_nothing(any_machine: PrivateSystemd, install: Install) -> None:
    """After `systemctl stop` clients have been told goodbye, new ones are refused, and nothing
    of ours is in the FD store."""
    service = install(any_machine, "stopped", "holder")
    with service.connect() as client:
        client.add()
        service.stop()

        assert ["goodbye", ""] == [client.line(), client.line()]
    assert ["inactive", "0"] == service.show("ActiveState", "NFileDescriptorStore")
    with pytest.raises(ConnectionRefusedError):
        service.connect()
    service.start()
    with service.connect() as client:
        assert (1, 1, 1) == client.add()


def test_stop_with_a_client_in_the_backlog(any_machine: PrivateSystemd, install: Install) -> None:
    """Who was not accepted yet when a real stop came is cut, and does not hang."""
    service = install(any_machine, "backlog", "holder")
    with service.connect() as blocking:
        blocking.add()
        service.signal("SIGSTOP")
        with service.connect() as waiting:
            service.stop()  # PID 1 sends SIGCONT as well

            assert waiting.line() in ("", "goodbye")
    service.until(ActiveState="inactive", NFileDescriptorStore="0")


def test_start_after_parking_by_hand(any_machine: PrivateSystemd, install: Install) -> None:
    """SIGTERM sent by hand parks, because Restart= may follow; daemon-reload and daemon-reexec
    between the park and the start change nothing."""
    service = install(any_machine, "signalled", "holder", "RestartSec=3600")
    with service.connect() as client:
        client.add()
        service.signal("SIGTERM")
        service.until(SubState="auto-restart")
        assert 2 == service.stored
        any_machine.run(["systemctl", "daemon-reload"])
        any_machine.run(["systemctl", "daemon-reexec"])
        client.send("add\n")
        service.restart()  # on 252 `start` waits for RestartSec=

        assert "2 2 2" == client.line()
    assert 1 == service.stored


@pytest.mark.parametrize("policy", ["no", "on-failure"])
def test_sigterm_where_no_restart_follows(
    any_machine: PrivateSystemd, install: Install, policy: str
) -> None:
    """SIGTERM by hand is a stop for good where Restart= starts nothing after a clean exit."""
    service = install(any_machine, f"ended-{policy}", "holder", f"Restart={policy}")
    with service.connect() as client:
        client.add()
        service.signal("SIGTERM")

        assert ["goodbye", ""] == [client.line(), client.line()]
    service.until(ActiveState="inactive", NFileDescriptorStore="0")


def test_reexecuting_pid_1(any_machine: PrivateSystemd, install: Install) -> None:
    """A restart after daemon-reexec, which hands the FD store from one PID 1 to the next, works."""
    service = install(any_machine, "reexec", "holder")
    with service.connect() as client:
        client.add()
        any_machine.run(["systemctl", "daemon-reexec"])
        service.restart()

        assert (2, 2, 2) == client.add()
    assert 1 == service.stored


@contextlib.contextmanager
def _newcomers(service: Service) -> Iterator[list[str]]:
    """Connect and ask again and again; yields what went wrong."""
    wrong: list[str] = []
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            try:
                with service.connect() as client:
                    client.add()
            except ConnectionRefusedError:
                wrong.append("refused")
            except (OSError, ValueError):
                pass  # accepted by the one that was killed: cut, not refused

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", ["SIGKILL", "SIGABRT"])
def test_a_crash_keeps_the_listener(
    any_machine: PrivateSystemd, install: Install, number: str
) -> None:
    """A crash cuts the connections, but nobody is refused while the next instance starts."""
    service = install(any_machine, "crashing", "holder", "LimitCORE=0")
    with service.connect() as client:
        client.add()
        with _newcomers(service) as wrong:
            for crashes in range(1, 4):
                service.signal(number)
                service.until(NRestarts=str(crashes), ActiveState="active")
                with service.connect() as other:
                    other.add()

        assert "" == client.line()
        assert [] == wrong
    assert 1 == service.stored
    assert Origin.COLD is service.status.origin


def test_the_watchdog(any_machine: PrivateSystemd, install: Install) -> None:
    """An instance that the watchdog aborts comes back with its listener; nobody is refused."""
    service = install(any_machine, "watched", "holder", "LimitCORE=0", "WatchdogSec=1")
    with _newcomers(service) as wrong:
        service.until(NRestarts="1", ActiveState="active")

    assert [] == wrong
    assert "Watchdog timeout" in service.messages()


def test_a_source_that_does_not_end_in_time(any_machine: PrivateSystemd, install: Install) -> None:
    """A source that is stuck in its own code is killed after TimeoutStopSec=: that is a crash,
    the listener stays and the next instance starts."""
    service = install(any_machine, "hanging", "holder", "TimeoutStopSec=500ms")
    with service.connect() as client, _newcomers(service) as wrong:
        client.send("block 3600\n")
        assert eventually(lambda: _is_stuck(service))
        service.restart()

        assert "" == client.line()
        with service.connect() as other:
            other.add()
    assert [] == wrong
    assert "timed out. Killing." in service.messages()


def _is_stuck(service: Service) -> bool:
    with service.connect() as probe:
        probe.sock.settimeout(0.3)
        try:
            return not probe.ask("add")
        except TimeoutError:
            return True


def test_soft_reboot(install: Install) -> None:
    """Connections from outside of the machine, and the state, survive a soft-reboot of a unit
    that something refers to which is never unloaded; targets are, once everything is stopped."""
    with PrivateSystemd.boot("trixie") as machine:
        service = Service(machine, "rebooted", "holder", ())
        # Not WantedBy=: the shutdown starts something in the slice, which would pull the unit in.
        drop_in = "/etc/systemd/system/system.slice.d/rebooted.conf"
        machine.write(drop_in, f"[Unit]\nBefore={service.unit}\n")
        machine.run(["systemctl", "daemon-reload"])
        service.start()
        with service.connect() as client, service.connect() as idle:
            client.add()
            idle.add()
            client.send("add\nad")
            assert "2 3 1" == client.line()
            machine.soft_reboot()
            client.send("d\n")

            assert "3 4 2" == client.line()
            assert (2, 5, 2) == idle.add()
        assert 1 == service.stored
        assert Origin.RESTART is service.status.origin
