# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with pipelining, subscribers and times to live, upgraded in all modes and both directions
while clients keep books."""

import asyncio
import shlex
from typing import Any

import pytest

from tests.support import eventually
from tests.system.checker import Checker, Size
from tests.system.reloading import installed
from tests.system.serving import Install, Service, allow_many_fds
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd

MODES = ("live", "restart", "exec")
FEW = Size(idle=50, rate=500, bytes=600)
MANY = Size(idle=500, rate=1000, bytes=200)


def attempt(service: Service, mode: str, version: int, *, refuse: bool = False) -> dict[str, Any]:
    """Upgrade into a version, which may refuse; returns what was said."""
    variables = {"VERSION": str(version), **({"REFUSE": "yes"} if refuse else {})}
    if mode != "exec":
        service.environment(**variables)
        return upgrade(service, "--mode", mode)
    python = shlex.join(service.machine.python)
    assigned = " ".join(f"{name}={value}" for name, value in variables.items())
    command = f"/usr/bin/env {assigned} {python} /opt/upgrader-tests/cache.py"
    return upgrade(service, "--mode", mode, "--exec-command", command)


def is_served_by(service: Service, version: int) -> bool:
    """Whether a new client meets that version."""
    with service.connect() as client:
        return str(version) == client.ask("VERSION")


@pytest.mark.parametrize(
    ("upgrades", "size"),
    [(3, FEW), pytest.param(30, MANY, marks=pytest.mark.matrix)],
    ids=["few", "many"],
)
def test_nothing_is_lost_doubled_or_reordered(
    host_machine: PrivateSystemd, install: Install, upgrades: int, size: Size
) -> None:
    """Each subscriber hears every message once and in order, the slow one too; each answer is the right
    one; every write that was acknowledged is there; keys end when they are due. Before each upgrade a
    version refuses."""
    allow_many_fds(size.idle)
    patient = "Environment=UPGRADER_LOAD_ATTEMPTS=1000"
    service = installed(host_machine, install, "cache", patient, program="cache")
    checker = Checker(service, size)
    pauses: dict[str, float] = {}

    def work() -> None:
        for number in range(upgrades):
            wanted = checker.published["busy"] + size.rate
            assert eventually(lambda w=wanted: checker.over or checker.published["busy"] > w)
            if checker.over:  # a client has failed
                return
            mode, old, new = MODES[number % 3], 1 + number % 2, 2 - number % 2

            said = attempt(service, mode, new, refuse=True)
            assert said["result"] in ("failed-old-serves", "not-serving"), said
            assert "not with" in said["cause"]
            service.environment(VERSION=str(old))
            service.until(ActiveState="active")
            assert is_served_by(service, old)

            before = service.status.generation
            said = attempt(service, mode, new)
            assert ("done", mode) == (said["result"], said["mode"]), said
            assert is_served_by(service, new)
            assert (before + 1, 0) == (service.status.generation, service.status.left_behind)
            service.environment(VERSION=str(new))
            pauses[mode] = max(pauses.get(mode, 0.0), said["after"]["pause"])

    asyncio.run(checker.run(work))

    heard, published = checker.heard, checker.published
    assert published["busy"] + 1 == heard["slow"] == heard["busy"] / 2
    assert (published["quiet"] + 1) * size.idle == heard["quiet"]
    assert published["expired"] + 1 == heard["expired"]
    lines = [
        ["upgrades", str(upgrades)],
        ["upgrades that were refused", str(upgrades)],
        ["messages published", str(published["busy"] + published["quiet"])],
        ["messages heard", str(heard.total())],
        ["commands answered", str(sum(each.acknowledged for each in checker.pipelines))],
        ["clients that came and went", str(checker.hurried)],
        ["keys that ended", str(published["expired"])],
        ["longest that a key lived too long", f"{checker.latest * 1000:.0f} ms"],
        *([f"longest pause, {m}", f"{s * 1000:.0f} ms"] for m, s in pauses.items()),
    ]
    print(lines)
    if size is MANY:
        publish("checker", ("what", "figure"), lines)
