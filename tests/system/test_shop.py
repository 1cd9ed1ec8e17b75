# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FastAPI application with all that lasts, upgraded again and again under its users."""

import json

import pytest

from tests.support import eventually
from tests.system.reloading import live, reload
from tests.system.serving import Install, Service
from tests.system.shoppers import Shoppers
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin


def shop(machine: PrivateSystemd, name: str) -> list[str]:
    """A unit that serves shop.py, and can be upgraded live."""
    python = " ".join(machine.python)
    command = f"{python} -m upgrader.asgi shop:app --app-dir /opt/upgrader-tests"
    return [
        *live(machine, name),
        "Environment=UPGRADER_DOWNTIME_LIMIT=5s UPGRADER_DRAIN_TIMEOUT=15s",
        "Environment=UPGRADER_LIVE_DRAIN_TIMEOUT=60s",
        "Environment=UPGRADER_WEBSOCKET_TIMEOUT=1s UPGRADER_WEBSOCKET_SPREAD=1s",
        f"Environment=DATABASE=/run/{name}/shop.db",
        "TimeoutStopSec=60",
        "ExecStart=",
        f"ExecStart={command} --port ${{PORT}} --no-access-log",
    ]


def drained(service: Service) -> list[object]:
    """The instances that have been replaced and have not ended."""
    said = service.machine.run(["upgrader", "status", "--json", service.unit]).stdout
    found: list[object] = json.loads(said)["draining"]
    return found


def upgrade(service: Service, number: int, *, restart: bool) -> None:
    """Into another version, live or by a restart."""
    service.environment(ROUND=str(number))
    if restart:
        # What an earlier instance still drains would end with this one.
        assert eventually(lambda: not drained(service))
        service.restart()
    else:
        assert eventually(service.answers)
        assert reload(service), service.messages()
    origin = Origin.RESTART if restart else Origin.LIVE
    assert (number + 1, origin) == (service.status.generation, service.status.origin)


@pytest.mark.parametrize(
    ("rounds", "megabytes", "seconds"),
    [("LRL", 4, 1.0), pytest.param("LLLLR" * 5, 50, 3.0, marks=pytest.mark.matrix)],
    ids=["few", "many"],
)
def test_nothing_of_an_application_is_lost(
    host_machine: PrivateSystemd, install: Install, rounds: str, megabytes: int, seconds: float
) -> None:
    """Uploads, downloads, events, WebSockets, background tasks and a pool: each body and each answer
    is right, no request fails, and there are as many rows as answers that promise one."""
    service = install(host_machine, "shop", "shop", *shop(host_machine, "shop"))
    size = megabytes << 20
    with Shoppers(host_machine, service.port, size=size, seconds=seconds) as shoppers:
        for number, how in enumerate(rounds, 1):
            assert eventually(lambda: shoppers.busy or shoppers.failures)
            assert [] == shoppers.failures
            upgrade(service, number, restart=how == "R")
        shoppers.stop()
        assert [] == shoppers.failures

        for kind in ("upload", "download", "events", "chat", "later", "hash"):
            assert shoppers.done[kind] >= 2, shoppers.done
        for kind, names in shoppers.acknowledged.items():
            wanted = sorted(names)
            assert eventually(lambda k=kind, w=wanted: w == shoppers.rows(k)), kind
    assert len(rounds) + 1 == service.status.generation
    if megabytes >= 50:
        lines = [[what, str(count)] for what, count in sorted(shoppers.done.items())]
        lines += [
            [f"rows of {kind}", str(len(rows))] for kind, rows in shoppers.acknowledged.items()
        ]
        publish("shop", ("what", "done"), lines)
