# SPDX-License-Identifier: LGPL-2.1-or-later
"""`check --preflight` and `upgrade --preflight`: a bad version is found before it is needed."""

import json

import pytest

from tests.system.reloading import live, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import described, status, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

BAD = [
    ("exit", "has ended before it was ready"),
    ("refusing", "not with me"),
    ("unreadable", "saved as version 2"),
    ("lingering", "no progress within 0.3 s"),
    ("hang", "was not ready in time"),
]


@pytest.fixture
def service(trixie_machine: PrivateSystemd, install: Install) -> Service:
    more = [*live(trixie_machine, "tried"), "TimeoutStartSec=4"]
    made = install(trixie_machine, "tried", "holder", *more)
    assert socket_there(made)
    return made


@pytest.mark.parametrize(("mode", "reason"), BAD)
def test_a_bad_version_is_found(service: Service, mode: str, reason: str) -> None:
    """Named, with its reason; the service serves on, its status does not speak of it, and there is
    no hold: nothing was upgraded. The next reload is not a preflight."""
    before = service.show("MainPID", "StatusText")
    with service.connect() as client:
        client.add()
        service.environment(MODE=mode)

        done = upgrader(service.machine, "check", service.unit, "--preflight")

        assert 1 == done.returncode, done
        assert "cannot be upgraded" in done.stdout
        assert "would not take over" in done.stdout
        assert reason in done.stdout
        assert before == service.show("MainPID", "StatusText")
        assert status(service)["hold"] is None
        service.environment(ROUND="2")
        assert 0 == upgrader(service.machine, "upgrade", service.unit).returncode
        assert (2, 2, 2) == client.add()


def test_a_good_version_is_not_taken(any_machine: PrivateSystemd, install: Install) -> None:
    """It loads everything and goes again: connections are where they were, the reload is no failure,
    and upgrades follow as ever, with a preflight before them or without."""
    service = install(any_machine, "proved", "holder", *live(any_machine, "proved"))
    assert socket_there(service)
    before = service.show("MainPID", "StatusText", "NRestarts")
    with service.clients(3) as clients:
        assert [1, 2, 3] == [client.add()[1] for client in clients]
        for _ in range(2):
            service.environment(ROUND="2")
            done = upgrader(any_machine, "check", service.unit, "--preflight")
            assert 0 == done.returncode, done
            assert "the version on disk has loaded everything" in done.stdout
            assert before == service.show("MainPID", "StatusText", "NRestarts")
            last = described(service)["last"]
            assert ("aborted", "preflight-passed") == (last["decision"], last["code"])
        assert {1} == {client.add()[2] for client in clients}
        metrics = upgrader(any_machine, "status", service.unit, "--prometheus").stdout
        assert "upgrader_last_upgrade_success" not in metrics  # there was none
        assert f'upgrader_last_preflight_success{{unit="{service.unit}"}} 1\n' in metrics
        rows = upgrader(any_machine, "history", service.unit, "-n", "2").stdout.splitlines()
        assert [True, True] == [" preflight " in row and " passed " in row for row in rows[1:]]
        done = upgrader(any_machine, "upgrade", service.unit, "--preflight", "--json")
        assert ("done", 0) == (json.loads(done.stdout)["result"], done.returncode)
        assert "preflight passed in " in done.stderr
        assert {(3, 2)} == {(count, seen) for count, _, seen in (c.add() for c in clients)}
        assert socket_there(service)
        service.environment(MODE="refusing")
        for more in (["--mode", "restart"], []):
            done = upgrader(any_machine, "upgrade", service.unit, "--preflight", *more)
            assert (1, True) == (
                done.returncode,
                "preflight: the version on disk would not take over" in done.stderr,
            )
        assert "not with me" in status(service)["hold"]["cause"]
        assert {2} == {client.add()[2] for client in clients}
    assert 0 == upgrader(any_machine, "unhold", service.unit).returncode
    entries = service.journal("UPGRADER_PHASE=migrate", "PRIORITY=6")
    assert any("preflight passed: all was loaded and checked" in str(e["MESSAGE"]) for e in entries)
