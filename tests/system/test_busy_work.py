# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that has begun when an upgrade is wanted: it is waited for while all are served, or the upgrade
is refused; an answer that was given is never for a write that is lost."""

import time

import pytest

from tests.system.reloading import installed, reload, socket_there
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

#: Seconds that the work takes, and the longest time that another client may wait meanwhile.
TAKES, WAITS = 3.0, 1.0


def served(service: Service) -> tuple[int, int]:
    """The total and the generation that a new client is told."""
    with service.connect() as client:
        _, total, generation = client.add()
        return total, generation


@pytest.mark.parametrize("work", ["busy", "turn"])
def test_p1_work_that_ends_in_time_is_waited_for(
    host_machine: PrivateSystemd, install: Install, work: str
) -> None:
    """Everybody else is served meanwhile, and what the work has written is there afterwards."""
    service = installed(host_machine, install, "patient", program="lively")
    assert socket_there(service)
    with service.connect() as worker:
        worker.send(f"{work} {TAKES}\n")
        service.environment(ROUND="2")
        command = ["systemctl", "reload", "--no-block", service.unit]
        service.machine.run(command)
        longest = 0.0
        while (asked := time.monotonic()) and served(service)[1] == 1:
            longest = max(longest, time.monotonic() - asked)

        assert "done" == worker.line()
        assert longest < WAITS
    total, generation = served(service)
    assert 2 == generation
    assert (total > 10**6) == (work == "turn")


@pytest.mark.parametrize("work", ["busy", "turn"])
def test_p1_work_that_does_not_end_ends_the_attempt(
    host_machine: PrivateSystemd, install: Install, work: str
) -> None:
    """The instance serves on, says who was busy, and blames no version."""
    service = installed(
        host_machine, install, "refusing",
        "Environment=UPGRADER_DRAIN_TIMEOUT=1s UPGRADER_MIGRATION_TIMEOUT=4s",
        program="lively",
    )  # fmt: skip
    assert socket_there(service)
    with service.connect() as worker:
        worker.send(f"{work} {3 * TAKES}\n")
        service.environment(ROUND="2")

        assert not reload(service)

        assert 1 == served(service)[1]
        assert "busy all the time" in service.messages()
        assert "done" == worker.line()
    total, generation = served(service)
    assert 1 == generation
    assert (total > 10**6) == (work == "turn")
    assert reload(service), service.messages()
    assert served(service)[0] > total
    assert not service.inside(f"/var/lib/upgrader/hold/{service.unit}").exists()


def test_p4_no_restart_is_asked_for_that_would_cut_a_turn(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """`upgrader upgrade --mode restart` waits first, while all are served, and then says who is busy."""
    service = installed(
        host_machine, install, "unsettled", "Environment=UPGRADER_DRAIN_TIMEOUT=500ms",
        program="lively",
    )  # fmt: skip
    assert socket_there(service)
    before = service.pid
    with service.connect() as worker:
        worker.send(f"turn {TAKES}\n")
        assert 1 == served(service)[1]

        answer = upgrade(service, "--mode", "restart")

        assert ("busy-work", before) == (answer["code"], service.pid)
        assert "the turn of" in answer["cause"]
        assert "done" == worker.line()
        assert 0 == upgrade(service, "--mode", "restart")["exit_code"]
    total, generation = served(service)
    assert 2 == generation
    assert total > 10**6
