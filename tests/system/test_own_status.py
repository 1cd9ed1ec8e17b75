# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that writes STATUS= of its own all the time is upgraded like any other."""

from tests.support import eventually
from tests.system.reloading import live, socket_there
from tests.system.serving import Install, Service, hook
from tests.system.tool import upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def talks(service: Service) -> bool:
    """Whether the status text is the program's own."""
    return eventually(lambda: service.show("StatusText")[0].endswith(" messages so far"))


def test_u5_a_status_text_of_the_program(any_machine: PrivateSystemd, install: Install) -> None:
    """Who uses the library and what became of an upgrade is told by the instances: to check, status,
    list, upgrade in each mode, and to the hook of package managers."""
    # The machine may be made of a container, whose own answer is no.
    any_machine.run(["rm", "-f", "/usr/sbin/policy-rc.d"])
    lines = [*live(any_machine, "chatty"), "Environment=SAYS=1"]
    service = install(any_machine, "chatty", "holder", *lines)
    assert socket_there(service)
    with service.connect() as client:
        assert (1, 1, 1) == client.add()
        assert talks(service)

        checked = upgrader(any_machine, "check", service.unit)
        assert (0, True) == (checked.returncode, "can be upgraded live" in checked.stdout)
        shown = upgrader(any_machine, "status", service.unit).stdout
        assert "instance: generation 1, cold start" in shown
        assert service.unit in upgrader(any_machine, "list").stdout
        for number, mode in enumerate(("live", "restart", "exec"), 2):
            assert talks(service)
            done = upgrader(any_machine, "upgrade", service.unit, "--mode", mode)
            assert (0, "") == (done.returncode, done.stderr * done.returncode)
            assert (
                f"generation {number}, loaded by {mode} from generation {number - 1}" in done.stdout
            )
            assert number == client.add()[2]
        listed = f"usr/lib/systemd/system/{service.unit}\n"
        assert talks(service)
        assert f"{service.unit}: upgraded in" in hook(any_machine, "--files", files=listed)
        assert 5 == client.add()[2]
        assert talks(service)
        pid = service.pid
        service.environment(MODE="refusing")
        said = hook(any_machine, "--installed", service.unit)
        assert f"{service.unit}: not upgraded, it serves as before: " in said
        assert "not with me" in said
        assert (pid, 5) == (service.pid, client.add()[2])
