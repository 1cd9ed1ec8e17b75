# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services with worker processes: many upgrades, a stop, and what check says of them."""

import time

import pytest

from tests.support import eventually
from tests.system.reloading import live, processes, reload
from tests.system.serving import Client, Install, Service
from tests.system.tool import upgrader
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd as Machine

#: Processes of an instance with a pool of two: the instance itself, Python's own ones, and the workers.
COUNT = {"fork": 3, "forkserver": 5, "spawn": 4}


def installed(machine: Machine, install: Install, method: str) -> Service:
    name = f"pooled-{method}"
    lines = [*live(machine, name), f"Environment=METHOD={method}", "TimeoutStopSec=20"]
    return install(machine, name, "pooled", *lines)


def upgraded(service: Service, client: Client, generation: int) -> tuple[int, int]:
    """Upgrade it, and have it use its pool; returns FDs and KiB of the main process."""
    assert eventually(service.answers)
    service.environment(ROUND=str(generation))
    assert reload(service), service.messages()
    assert 2 == len(client.ask("pids").split())
    method = service.name.partition("-")[2]
    assert eventually(lambda: len(processes(service)) == COUNT[method]), processes(service)
    lines = service.inside(f"/proc/{service.pid}/status").read_text().splitlines()
    (rss,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return service.open_fds(service.pid), rss


def stops_at_once(service: Service) -> None:
    """A stop ends all, and not only when TimeoutStopSec= is over."""
    begin = time.monotonic()
    service.stop()

    assert time.monotonic() - begin < 15
    assert ["success"] == service.show("Result")


@pytest.mark.parametrize("method", COUNT)
def test_p10_a_pool_of_workers(host_machine: Machine, install: Install, method: str) -> None:
    """Each upgrade leaves as many processes as a start, and a stop leaves none, in time."""
    service = installed(host_machine, install, method)
    with service.connect() as client:
        assert 2 == len(client.ask("pids").split())
        assert COUNT[method] == len(processes(service))
        for generation in (2, 3):
            upgraded(service, client, generation)
        stops_at_once(service)


@pytest.mark.matrix
def test_p10_many_upgrades_with_pools(host_machine: Machine, install: Install) -> None:
    """Thirty, with a pool of each start method: processes, FDs and memory stay as they are."""
    rows = []
    for method in COUNT:
        service = installed(host_machine, install, method)
        with service.connect() as client:
            client.ask("pids")
            seen = [upgraded(service, client, generation) for generation in range(2, 32)]
            fds, memory = [each[0] for each in seen], [each[1] for each in seen]
            assert min(fds[-5:]) <= min(fds[:5]), fds  # somebody may be asking in between
            assert max(memory[5:]) <= 1.1 * max(memory[:5])
            stops_at_once(service)
        figures = [f"{values[0]} to {values[-1]}" for values in (fds, memory)]
        rows.append([method, str(COUNT[method]), *figures])
    publish("pools", ["method", "processes", "FDs", "KiB of the instance"], rows)


def test_p10_check_names_them(trixie_machine: Machine, install: Install) -> None:
    """What an upgrade ends, and what it does not."""
    service = installed(trixie_machine, install, "fork")
    with service.connect() as client:
        pid, kept = client.ask("start plain"), client.ask("start kept")
        assert client.ask("start orphan")
        assert eventually(lambda: len(processes(service)) == 4)
        (orphan,) = {*processes(service)} - {str(service.pid), pid, kept}
        assert eventually(service.answers)

        said = upgrader(trixie_machine, "check", service.unit).stdout

        assert f"ends what the instance has started, by SIGTERM: {pid} (sleep)" in said
        assert f"looks after any more in this unit: {orphan} (sleep)" in said
        service.environment(ROUND="2")
        assert reload(service), service.messages()
        left = sorted([str(service.pid), kept, orphan])
        assert eventually(lambda: sorted(processes(service)) == left)
        assert f"{pid} (sleep)" not in upgrader(trixie_machine, "check", service.unit).stdout

        def told(phase: str) -> set[str]:
            said = service.journal(f"UPGRADER_PHASE={phase}", "UPGRADER_SIDE=source")
            return {each["UPGRADER_ID"] for each in said}

        assert eventually(lambda: bool(told("children") and told("migrate")))
        assert told("children") == told("migrate")
    stops_at_once(service)
