# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parameters under a real systemd: from the unit, set at run time, inherited; what they change."""

import json
import subprocess

import pytest

from tests.support import eventually
from tests.system.reloading import live, reload, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import described, status, upgrader
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin


def upgraded(service: Service, how: str) -> None:
    """Into another instance, live or by a restart."""
    service.environment(ROUND="2")
    if how == "live":
        assert reload(service), service.messages()
    else:
        service.restart()
    assert socket_there(service)


@pytest.mark.parametrize("how", ["live", "restart"])
@pytest.mark.parametrize("where", ["source", "destination"])
def test_connections_that_may_not_move(
    trixie_machine: PrivateSystemd, install: Install, how: str, where: str
) -> None:
    """With backend-transfer=no for a door on either side, its connections are drained at the source
    (or closed, where that has gone), the listener and the state are there, and it is counted."""
    service = install(trixie_machine, "staying", "holder", *live(trixie_machine, "staying"))
    assert socket_there(service)
    with service.clients(2) as (idle, busy):
        assert [1, 2] == [each.add()[1] for each in (idle, busy)]
        if where == "source":
            done = upgrader(trixie_machine, "set", service.unit, "backend-transfer.door=no")
            assert done.returncode == 0, done.stderr
        busy.send("busy 1\n")
        assert eventually(lambda: described(service)["backends"][0].get("busy") == 1)
        if where == "destination":
            service.environment(UPGRADER_BACKEND_TRANSFER="door=no", ROUND="2")
            assert reload(service) if how == "live" else service.restart()
        else:
            upgraded(service, how)

        if (how, where) != ("restart", "destination"):
            assert ["done", "goodbye", ""] == [busy.line() for _ in range(3)]
            assert ["goodbye", ""] == [idle.line() for _ in range(2)]
        else:
            assert "" == idle.line()
        assert socket_there(service)
        with service.connect() as client:
            assert (1, 3, 2) == client.add()
        # Parked by a source that has drained them, none is left.
        left = 0 if (how, where) == ("restart", "source") else 2
        assert (Origin(how), left) == (service.status.origin, service.status.left_behind)


def test_what_was_set_is_inherited(any_machine: PrivateSystemd, install: Install) -> None:
    """By the next instance, live and by a restart, until the service is stopped; an empty value
    goes back to what the unit says."""
    service = install(any_machine, "setting", "holder", *live(any_machine, "setting"))
    assert socket_there(service)

    def held() -> str:
        found = described(service)["parameters"]["drain-timeout"]
        assert isinstance(found, str)
        return found

    assert "5s" == held()
    done = upgrader(any_machine, "set", service.unit, "drain-timeout=7s", "downtime-limit=1s")
    assert (0, True) == (done.returncode, "drain-timeout=7s" in done.stdout), done.stderr
    for how in ("live", "restart"):
        upgraded(service, how)
        assert "7s" == held()
        assert "1s" == described(service)["parameters"]["downtime-limit"]
    done = upgrader(any_machine, "set", service.unit, "drain-timeout=")
    assert (0, "5s") == (done.returncode, held())
    service.stop()
    service.start()
    assert socket_there(service)
    assert "300ms" == described(service)["parameters"]["downtime-limit"]


def test_parameters_for_one_call(trixie_machine: PrivateSystemd, install: Install) -> None:
    """`upgrade --set` holds for that upgrade, done or failed, and what was set before is back then;
    one that makes no sense is wrong usage, and nothing is done."""
    machine = trixie_machine
    service = install(machine, "once", "holder", *live(machine, "once"))
    assert socket_there(service)
    upgrader(machine, "set", service.unit, "drain-timeout=7s")
    wanted = ["--set", "backend-transfer=no", "--set", "drain-timeout=8s"]
    with service.connect() as client:
        client.add()
        for variables, code in ({"MODE": "refusing"}, 1), ({"ROUND": "2"}, 0):
            service.environment(**variables)
            done = upgrader(machine, "upgrade", service.unit, *wanted, "--quiet")
            assert code == done.returncode, done.stderr
            held = described(service)["parameters"]
            assert ("yes", "7s") == (held["backend-transfer"], held["drain-timeout"])
        assert ["goodbye", ""] == [client.line() for _ in range(2)]
    before = service.pid
    done = upgrader(machine, "upgrade", service.unit, "--set", "insurance=soon")
    assert (2, before) == (done.returncode, service.pid)
    assert "insurance: 'soon' is not a time span" in done.stderr


def test_cancel_leaves_the_old_one_serving(any_machine: PrivateSystemd, install: Install) -> None:
    """Before the commit, whether the new one still prepares or already loads; nothing is lost, the
    caller is told, and the next upgrade goes in. Without one there is nothing to cancel."""
    more = [*live(any_machine, "called"), "Environment=UPGRADER_DOWNTIME_LIMIT=30s"]
    service = install(any_machine, "called", "holder", *more)
    assert socket_there(service)
    nothing = upgrader(any_machine, "cancel", service.unit)
    assert (1, True) == (nothing.returncode, "no upgrade is under way" in nothing.stderr)
    with service.connect() as client:
        client.add()
        for mode, phase in (("hang", "setup"), ("lingering", "loading")):
            service.environment(MODE=mode)
            command = ["systemctl", "reload", service.unit]
            with any_machine.popen(command, stderr=subprocess.DEVNULL) as reloading:

                def there(phase: str = phase) -> bool:
                    # Describe is answered while everything else is frozen.
                    return bool(described(service)["migration"]["phase"] == phase)

                assert eventually(there)
                done = upgrader(any_machine, "cancel", service.unit)
                assert (0, True) == (done.returncode, "cancelled" in done.stdout), done.stderr
                assert 0 != reloading.wait(30)
            assert client.add()[2] == 1
            assert eventually(lambda: described(service)["phase"] == "serving")
            last = described(service)["migration"]
            assert ("cancelled", "cancelled") == (last["phase"], last["reason"])
        waiting = ["upgrader", "upgrade", "--quiet", service.unit]
        with any_machine.popen(waiting, stderr=subprocess.PIPE) as upgrading:
            assert eventually(there)
            assert 0 == upgrader(any_machine, "cancel", service.unit).returncode
            _, said = upgrading.communicate(timeout=30)
        assert (1, True) == (upgrading.returncode, "it serves as before: it was cancelled" in said)
        assert status(service)["hold"] is None
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        assert client.add()[2] == 2


def test_the_usual_mode(any_machine: PrivateSystemd, install: Install) -> None:
    """UPGRADER_MODE=restart in the unit is what an upgrade does where the command does not say."""
    more = [*live(any_machine, "usual"), "Environment=UPGRADER_MODE=restart"]
    service = install(any_machine, "usual", "holder", *more)
    for arguments, mode in ([], "restart"), (["--mode", "live"], "live"):
        assert socket_there(service)
        assert described(service)["parameters"]["mode"] == "restart"
        done = upgrader(any_machine, "upgrade", "--json", "--quiet", service.unit, *arguments)
        assert (mode, True) == (json.loads(done.stdout)["mode"], done.returncode == 0)
