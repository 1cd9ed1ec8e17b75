# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with pipelining, subscribers and times to live, upgraded in all modes and both directions
while clients keep books."""

import asyncio
import shlex
import subprocess
import time

import pytest

from tests.support import eventually
from tests.system.checker import Checker, Size
from tests.system.reloading import installed
from tests.system.serving import Install, allow_many_fds
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd

MODES = ("live", "restart", "exec")
FEW = Size(idle=50, rate=500, bytes=600)
MANY = Size(idle=500, rate=1000, bytes=200)


@pytest.mark.parametrize(
    ("upgrades", "size"),
    [(3, FEW), pytest.param(30, MANY, marks=pytest.mark.matrix)],
    ids=["few", "many"],
)
def test_nothing_is_lost_doubled_or_reordered(
    host_machine: PrivateSystemd, install: Install, upgrades: int, size: Size
) -> None:
    """Each subscriber hears every message once and in order, the slow one too; each answer is the right
    one; every write that was acknowledged is there; keys end when they are due."""
    allow_many_fds(size.idle)
    service = installed(host_machine, install, "cache", program="cache")
    python = shlex.join(host_machine.python)
    checker = Checker(service, size)
    waits: dict[str, float] = {}

    def work() -> None:
        for number in range(upgrades):
            wanted = checker.published["busy"] + size.rate
            assert eventually(lambda w=wanted: checker.over or checker.published["busy"] > w)
            if checker.over:  # a client has failed
                return
            mode, version = MODES[number % 3], 2 - number % 2
            for pipeline in checker.pipelines:
                pipeline.longest = 0.0
            service.environment(VERSION=str(version))
            command = f"/usr/bin/env VERSION={version} {python} /opt/upgrader-tests/cache.py"
            said = upgrade(
                service, "--mode", mode, *(["--exec-command", command] if mode == "exec" else [])
            )

            assert ("done", mode) == (said["result"], said["mode"]), said
            assert (number + 2, 0) == (service.status.generation, service.status.left_behind)
            with service.connect() as client:
                assert str(version) == client.ask("VERSION")
            longest = max(pipeline.longest for pipeline in checker.pipelines)
            waits[mode] = max(waits.get(mode, 0.0), longest)

    asyncio.run(checker.run(work))

    heard, published = checker.heard, checker.published
    assert published["busy"] + 1 == heard["slow"] == heard["busy"] / 2
    assert (published["quiet"] + 1) * size.idle == heard["quiet"]
    assert published["expired"] + 1 == heard["expired"]
    lines = [
        ["upgrades", str(upgrades)],
        ["messages published", str(published["busy"] + published["quiet"])],
        ["messages heard", str(heard.total())],
        ["commands answered", str(sum(each.acknowledged for each in checker.pipelines))],
        ["clients that came and went", str(checker.hurried)],
        ["keys that ended", str(published["expired"])],
        ["longest that a key lived too long", f"{checker.latest * 1000:.0f} ms"],
        *([f"longest wait of a command, {m}", f"{s * 1000:.0f} ms"] for m, s in waits.items()),
    ]
    print(lines)
    if size is MANY:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
        lines.append(["date and commit", f"{time.strftime('%Y-%m-%d')}, {commit}"])
        publish("checker", ("what", "figure"), lines)
