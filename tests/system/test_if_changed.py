# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrade --if-changed` and `--all`: nothing is done for nothing, and what was done is told."""

import json
from typing import Any

from tests.system.reloading import installed
from tests.system.serving import Install, Service
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def upgrade(service: Service, *arguments: str) -> Any:
    """What `upgrade --if-changed --json` says; it must end with 0."""
    words = ("upgrade", "--if-changed", "--json", "--quiet", *arguments, service.unit)
    done = upgrader(service.machine, *words)
    assert 0 == done.returncode, done
    return json.loads(done.stdout)


def test_only_what_has_changed_is_upgraded(any_machine: PrivateSystemd, install: Install) -> None:
    """A file of the program, a setting of the unit, an environment file: each is a change, once."""
    service = installed(any_machine, install, "settled")
    program = "/opt/upgrader-tests/holder.py"

    def edited() -> None:
        any_machine.run(["sh", "-c", f"cp {program} {program}.new && mv {program}.new {program}"])

    def set_in_unit() -> None:
        any_machine.write(f"/etc/systemd/system/{service.unit}.d/x.conf", "[Service]\nUMask=0027\n")
        any_machine.run(["systemctl", "daemon-reload"])

    changes = (edited, set_in_unit, lambda: service.environment(SOME="thing"))
    with service.connect() as client:
        client.add()
        pid = service.pid
        assert ("done", False) == (upgrade(service)["result"], upgrade(service)["changed"])
        assert pid == service.pid
        for number, change in enumerate(changes, 2):
            change()
            would = upgrade(service, "--dry-run")
            assert (True, pid) == (would["changed"], service.pid)
            said = upgrade(service)
            assert (True, number) == (said["changed"], said["after"]["generation"]), said
            pid = service.pid
            again = upgrade(service)
            assert (False, pid) == (again["changed"], service.pid), again
            assert "nothing has changed since it was started" in again["line"]
        assert (2, 2, 4) == client.add()
    any_machine.run(["rm", "-r", f"/etc/systemd/system/{service.unit}.d"])


def test_all_of_them(trixie_machine: PrivateSystemd, install: Install) -> None:
    """Every unit that uses the library, one after the other; names and --all do not go together."""
    services = [installed(trixie_machine, install, f"every{number}") for number in (1, 2)]
    done = upgrader(trixie_machine, "upgrade", "--all", "--json", "--quiet")
    said = {each["unit"]: each for each in json.loads(done.stdout)}

    assert 0 == done.returncode, done
    assert all((True, 2) == (said[s.unit]["changed"], s.status.generation) for s in services)
    for wrong in ([], ["--all", services[0].unit]):
        assert 2 == upgrader(trixie_machine, "upgrade", *wrong).returncode


def test_n6_names_are_checked_before_the_first_upgrade(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """One mistyped name among several: nothing was done, as the exit code says."""
    service = installed(host_machine, install, "named")
    pid = service.pid
    done = upgrader(host_machine, "upgrade", service.unit, "nosuch")

    assert (4, pid) == (done.returncode, service.pid)
    assert "nosuch.service: not upgraded: there is no such unit" in done.stderr
