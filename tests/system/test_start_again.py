# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units that have failed with something parked for them: no call of ours makes PID 1 forget it."""

from collections.abc import Iterator
from subprocess import CompletedProcess

import pytest

from tests.system.serving import Install, Service, hook
from upgrader.lab.private_systemd import PrivateSystemd

_POLICY = "/etc/upgrader/policy.d/test.conf"
#: Lines of the unit that has PID 1 give up after the second attempt.
_LIMIT = ("[Unit]", "StartLimitIntervalSec=600", "StartLimitBurst=2")


@pytest.fixture
def clean(trixie_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    yield trixie_machine
    trixie_machine.run(["rm", "-rf", _POLICY, "/var/lib/upgrader/hold", "/run/upgrader/hook"])


def given_up(machine: PrivateSystemd, install: Install, name: str, *more: str) -> Service:
    """A service that nothing refers to, started by hand; the way it fails is up to the test."""
    service = install(machine, name, "holder", *more, *_LIMIT)
    machine.run(["systemctl", "disable", service.unit])
    return service


def fail(service: Service) -> None:
    """Restart it into a bad version until PID 1 gives up, and put the good one back."""
    service.environment(MODE="exit")
    service.restart(check=False)
    service.until(ActiveState="failed", SubState="failed")
    assert service.stored > 0
    service.environment()


def cli(service: Service, *arguments: str) -> "CompletedProcess[str]":
    return service.machine.run(["upgrader", *arguments, service.unit], check=False, timeout=60)


def test_n1_the_hook_keeps_what_is_parked(clean: PrivateSystemd, install: Install) -> None:
    """A bad version by a restart, the start limit, a good version: connections and state are there."""
    clean.write(_POLICY, "parked*.service = restart\n")
    service = given_up(clean, install, "parked")
    with service.connect() as client:
        client.add()
        service.environment(MODE="exit")
        assert "NOT SERVING" in hook(clean, "--installed", service.unit)
        service.until(ActiveState="failed")
        service.environment()
        said = hook(clean, "--installed", service.unit)

        assert f"{service.unit}: started, with what systemd held for it: generation 2" in said
        assert (2, 2, 2) == client.add()
    assert service.journal("UPGRADER_OUTCOME=done")
    assert "" == clean.run(["ls", "/var/lib/upgrader/hold"], check=False).stdout


def test_n5_an_upgrade_starts_it_within_the_start_limit(
    clean: PrivateSystemd, install: Install
) -> None:
    """`systemctl start` is refused, `upgrader upgrade` starts it with everything."""
    service = given_up(clean, install, "limited")
    with service.connect() as client:
        client.add()
        fail(service)
        refused = clean.run(["systemctl", "start", service.unit], check=False)
        assert refused.returncode != 0
        dry = cli(service, "upgrade", "--dry-run")
        assert "would be started, with what systemd holds for it" in dry.stdout
        done = cli(service, "upgrade")

        assert (0, "") == (done.returncode, service.show("DropInPaths")[0]), done.stderr
        assert "started, with what systemd held for it: generation 2" in done.stdout
        assert (2, 2, 2) == client.add()


def test_a_bad_version_started_again_is_a_failure(clean: PrivateSystemd, install: Install) -> None:
    """It says so, the image is kept, and the hold stays."""
    service = given_up(clean, install, "again")
    with service.connect() as client:
        client.add()
        fail(service)
        service.environment(MODE="exit")
        done = cli(service, "upgrade")
        assert 3 == done.returncode
        assert "the image of generation 1 is kept" in done.stderr
        assert service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()
        service.until(ActiveState="failed", SubState="failed")
        service.environment()

        assert 0 == cli(service, "upgrade").returncode
        assert (2, 2, 2) == client.add()


def test_a_cold_start_although_an_image_was_parked(clean: PrivateSystemd, install: Install) -> None:
    """The version on disk looks at no image: it serves, which is a failure all the same, and the
    image is parked still."""
    service = given_up(clean, install, "cold")
    with service.connect() as client:
        client.add()
        fail(service)
        service.environment(UPGRADER_DISCARD="all")
        done = cli(service, "upgrade")

        assert 1 == done.returncode
        assert "serving, but started without the image" in done.stderr
        assert "" == client.line()


def test_discard_forgets_nothing_before_it_starts(clean: PrivateSystemd, install: Install) -> None:
    """The listener, which is kept, is the same one; the image is set aside."""
    service = given_up(clean, install, "setaside")
    with service.connect() as client:
        client.add()
        fail(service)
        done = cli(service, "discard")

        assert 0 == done.returncode, done.stderr
        assert "image of generation 1 set aside" in done.stdout
        assert 2 == service.stored
        assert "" == client.line()


def test_without_a_bus(install: Install) -> None:
    """Over PID 1's own socket, which takes no references: as with a bus, and no drop-in is left."""
    with PrivateSystemd.boot("trixie") as machine:
        service = Service(machine, "nobus", "holder", _LIMIT)
        machine.run(["systemctl", "disable", service.unit])
        service.start()
        with service.connect() as client:
            client.add()
            fail(service)
            machine.run(["systemctl", "stop", "dbus.socket", "dbus.service"])
            done = cli(service, "upgrade")

            assert 0 == done.returncode, done.stderr
            assert "started, with what systemd held for it: generation 2" in done.stdout
            assert (2, 2, 2) == client.add()
            assert [""] == service.show("DropInPaths")
            done = cli(service, "upgrade", "--mode", "restart")
            assert 0 == done.returncode, done.stderr
            assert (3, 3, 3) == client.add()


def test_before_254_nothing_is_kept_and_that_is_said(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """A unit that has failed holds nothing there; a package's next version starts it cold."""
    if host_machine.systemd_version >= 254:
        pytest.skip("this systemd keeps it")
    service = install(host_machine, "older", "holder", *_LIMIT)
    service.environment(MODE="exit")
    service.restart(check=False)
    service.until(ActiveState="failed")
    service.environment()
    done = cli(service, "upgrade")

    assert 3 == done.returncode
    assert "keeps nothing for a unit that has failed" in done.stderr
    # The machine may be made of a container, whose own answer is no.
    host_machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
    said = hook(host_machine, "--installed", service.unit)
    assert f"{service.unit}: started, and no image was parked for it" in said
