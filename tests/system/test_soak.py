# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hundreds of upgrades of one service, in all modes, with clients that stay connected: nothing grows."""

import itertools
import os
import time

import pytest

from tests import tables
from tests.support import eventually
from tests.system.reloading import alone, processes
from tests.system.serving import Install, Service
from tests.system.sized import ask_all, move, sized
from upgrader.lab.private_systemd import PrivateSystemd

UPGRADES = int(os.environ.get("UPGRADES", "500"))
MODES = ("live", "restart", "live", "exec")
CLIENTS = 20
#: What the kernel rounds memory to, and what the allocator of a new process may do otherwise, in KiB.
SLACK = 2048
_CENSUS = """\
main=$(systemctl show -P MainPID $1); group=$(systemctl show -P ControlGroup $1)
echo $(ls /proc/$main/fd | wc -l) $(ls /proc/1/fd | wc -l) $(ls /proc/$main/task | wc -l)
cat /sys/fs/cgroup$group/cgroup.procs | wc -l
find /sys/fs/cgroup -type d | wc -l
find /run -xdev -not -path '/run/log*' -not -path '/run/systemd/journal*' | wc -l
awk '/^VmRSS:/ { print $2 }' /proc/$main/status /proc/1/status
"""
HEAD = (
    "upgrades", "FDs of the service", "of PID 1", "in the FD store", "threads", "processes", "cgroups",
    "files in /run", "KiB of the service", "of PID 1", "slowest answer, ms",
)  # fmt: skip


def census(service: Service) -> list[int]:
    """What HEAD names, without the first and the last; once the insurance is given up and the old process gone."""
    assert alone(service), processes(service)
    assert eventually(lambda: service.stored == 1), service.stored
    command = ["sh", "-c", _CENSUS, "sh", service.unit]
    seen: list[list[int]] = []

    def settled() -> bool:
        numbers = map(int, service.machine.run(command).stdout.split())
        fds, of_pid1, threads, processes, cgroups, files, memory, its = numbers
        seen.append([fds, of_pid1, service.stored, threads, processes, cgroups, files, memory, its])
        return len(seen) > 1 and seen[-2][:7] == seen[-1][:7]

    assert eventually(settled), seen
    return seen[-1]


def grown(first: list[int], last: list[int]) -> list[str]:
    """Which of all that is counted there is more of."""
    before = zip(HEAD[1:8], first, last, strict=False)
    return [name for name, one, other in before if other > one]


def soak(machine: PrivateSystemd, install: Install, upgrades: int, parts: int) -> list[list[str]]:
    """That many upgrades with a census after each of the parts; returns what it has found."""
    service = sized(machine, install, "soak", STATE_MB="1", UPGRADER_INSURANCE="1s")
    rows: list[list[str]] = []
    modes = itertools.cycle(MODES)
    with service.clients(CLIENTS) as clients:
        held = {answer[2] for answer in ask_all(clients[:1], "fill")}
        ask_all(clients[1:])
        for _ in range(len(MODES)):  # the first ones of each kind open what stays open
            move(service, next(modes))
        found = [census(service)]
        for part in range(1, parts + 1):
            slowest = 0.0
            for _ in range(upgrades // parts):
                move(service, next(modes))
                begun = time.monotonic()
                answers = ask_all(clients)
                slowest = max(slowest, time.monotonic() - begun)
                assert held == {answer[2] for answer in answers}
            found.append(census(service))
            number = len(MODES) + part * (upgrades // parts)
            rows.append([str(number), *map(str, found[-1]), f"{slowest * 1000:.0f}"])
        assert {1 + number} == {answer[1] for answer in answers}
    rows.insert(0, [str(len(MODES)), *map(str, found[0]), ""])
    first, last = found[0], found[-1]
    # A thread that an instance has begun with may not have ended yet, the first time or the last.
    assert grown(first, last) == [] or eventually(lambda: grown(first, census(service)) == []), rows
    assert last[7] < first[7] * 1.1 + SLACK, rows
    assert last[8] < first[8] * 1.1 + SLACK, rows
    return rows


@pytest.mark.matrix
def test_hundreds_leave_nothing(host_machine: PrivateSystemd, install: Install) -> None:
    """UPGRADES of them (500)."""
    tables.publish("soak", HEAD, soak(host_machine, install, UPGRADES, 10))
