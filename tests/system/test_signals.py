# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 sends by the settings of a unit: each signal does what it is sent for."""

import signal

import pytest

from tests.support import eventually
from tests.system.reloading import alone, crowd, live, reload, reload_twice, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def reloads(service: Service, times: int) -> bool:
    """Whether the author's own reload has run that often, after a while."""
    return eventually(lambda: service.messages().count("asked to reload") == times)


def catches(service: Service, *names: str) -> bool:
    """Whether the main process has handlers for signals; it asks systemd once it serves."""
    wanted = sum(1 << (signal.Signals[name] - 1) for name in names)

    def caught() -> bool:
        lines = service.inside(f"/proc/{service.pid}/status").read_text().splitlines()
        (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
        return wanted & mask == wanted

    return eventually(caught)


@pytest.mark.parametrize("signals", [("SIGINT", "SIGQUIT"), ("SIGUSR1", "SIGUSR2")])
def test_u6_kill_signals(
    any_machine: PrivateSystemd, install: Install, signals: tuple[str, str]
) -> None:
    """Whatever signals the unit names, a restart keeps all and a stop drains; so it is after a live
    upgrade."""
    lines = [f"KillSignal={signals[0]}", f"RestartKillSignal={signals[1]}"]
    service = install(any_machine, "killed", "lively", *live(any_machine, "killed"), *lines)
    with crowd(service) as clients:
        assert catches(service, *signals)
        service.restart()
        clients.is_served_by(2)
        assert eventually(service.answers)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(3)
        assert alone(service)
        assert catches(service, *signals)
        service.restart()
        clients.is_served_by(4)
        assert catches(service, *signals)
        service.stop()

        assert [""] * 3 == [client.line() for client in clients.clients]
    assert ["success", "0"] == service.show("Result", "NFileDescriptorStore")


def test_u3_sighup_to_all_of_a_unit(host_machine: PrivateSystemd, install: Install) -> None:
    """It is a reload, and ends nobody."""
    service = install(host_machine, "hup", "lively", *live(host_machine, "hup"))
    with crowd(service) as clients:
        for times in (1, 2):
            host_machine.run(["systemctl", "kill", "-s", "HUP", service.unit])
            assert reloads(service, times)
        clients.is_served_by(1)


def test_u3_a_further_line_of_execreload(any_machine: PrivateSystemd, install: Install) -> None:
    """`kill -HUP` before takeover does no harm, whether something has changed or not; check names it."""
    takeover, *lines = live(any_machine, "further")
    further = "ExecReload=/bin/kill -HUP $MAINPID"
    service = install(any_machine, "further", "lively", further, takeover, *lines)
    with crowd(service) as clients:
        assert socket_there(service)
        for times in (1, 2):
            assert reload(service), service.messages()
            assert reloads(service, times)
        clients.is_served_by(1)
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        clients.is_served_by(2)
        assert alone(service)
        assert reloads(service, 2)
        checked = upgrader(any_machine, "check", service.unit)
        assert 0 == checked.returncode
        assert "/bin/kill -HUP $MAINPID" in checked.stdout
        done = upgrader(any_machine, "upgrade", service.unit, "--mode", "live")
        assert 0 == done.returncode
        assert "/bin/kill -HUP $MAINPID" in done.stderr + done.stdout
        clients.is_served_by(3)


@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1"])
def test_u3_notify_reload(trixie_machine: PrivateSystemd, install: Install, number: str) -> None:
    """Without ExecReload=, a reload is the author's own, and PID 1 waits for its end."""
    lines = ["Type=notify-reload", f"ReloadSignal={number}"]
    name = f"notify-{number.lower()}"
    service = install(trixie_machine, name, "lively", *lines, f"RuntimeDirectory={name}")
    with crowd(service) as clients:
        assert catches(service, number)
        for times in (1, 2):
            assert reload(service), service.messages()
            assert reloads(service, times)
        clients.is_served_by(1)
    assert ["active", "running"] == service.show("ActiveState", "SubState")


def test_u3_notify_reload_with_takeover(trixie_machine: PrivateSystemd, install: Install) -> None:
    """The signal is left to takeover: one upgrade, or one reload of the author's own."""
    lines = live(trixie_machine, "both")
    service = install(trixie_machine, "both", "lively", "Type=notify-reload", *lines)
    with crowd(service) as clients:
        reload_twice(service, clients)
        assert reload(service), service.messages()
        assert reloads(service, 1)
        assert upgrader(trixie_machine, "check", service.unit).returncode == 0
    assert ["active", "running"] == service.show("ActiveState", "SubState")
