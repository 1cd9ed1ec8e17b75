# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that holds as much as it is told, upgraded in any mode; asserts only that it goes well."""

import time
from collections.abc import Sequence

from tests.system.reloading import installed
from tests.system.serving import Client, Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

LIMIT = 20_000  # LimitNOFILE=


def sized(machine: PrivateSystemd, install: Install, name: str, **environment: str) -> Service:
    """A service that holds so much, and may take its time."""
    patience = {"UPGRADER_DOWNTIME_LIMIT": "60s", "UPGRADER_MIGRATION_TIMEOUT": "120s"}
    words = " ".join(f"{k}={v}" for k, v in {**patience, **environment}.items())
    lines = [f"LimitNOFILE={LIMIT}", f"Environment={words}", "TimeoutStartSec=120"]
    return installed(machine, install, name, *lines, program="sized")


def move(service: Service, mode: str) -> tuple[float, float]:
    """Upgrade it; returns its pause and the seconds of all of it."""
    begun = time.monotonic()
    if mode == "restart":
        service.restart()
    else:
        said = upgrade(service, "--mode", mode)
        assert "done" == said["result"], said
    seconds = time.monotonic() - begun
    status = service.status
    assert 0 == status.left_behind, status
    return status.pause, seconds


def ask_all(clients: Sequence[Client], line: str = "x") -> list[list[int]]:
    """What each of them is told."""
    for client in clients:
        client.send(f"{line}\n")
    return [list(map(int, client.line().split())) for client in clients]
