# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first moments of an instance: nothing is handled before all that it has adopted is there."""

import contextlib
import sys
from pathlib import Path

import pytest

from tests.process.chat import Client
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("channels.py")
SUBSCRIBERS = 20
LINES = 200


@pytest.mark.parametrize("face", ["aio", "blocking"])
def test_a_publisher_that_was_there_first(face: str, tmp_path: Path) -> None:
    """Whole lines have moved along with its connection, which is the first one that is adopted:
    they wait until the handlers of all subscribers have been called anew."""
    path = tmp_path / "socket"
    with Service() as service, contextlib.ExitStack() as stack:
        service.start([sys.executable, str(PROGRAM), "aio", str(path)])
        publisher = stack.enter_context(Client(path))
        assert "0" == publisher.ask("publish to nobody")
        subscribers = [stack.enter_context(Client(path)) for _ in range(SUBSCRIBERS)]
        assert all("subscribed" == client.ask("subscribe") for client in subscribers)
        publisher.send("".join(f"publish {number}\n" for number in range(LINES)))
        assert str(SUBSCRIBERS) == publisher.line()
        service.upgrade([sys.executable, str(PROGRAM), face, str(path)])

        assert [str(SUBSCRIBERS)] * (LINES - 1) == [publisher.line() for _ in range(LINES - 1)]
        for client in subscribers:
            assert [str(number) for number in range(LINES)] == [client.line() for _ in range(LINES)]


def test_a_handler_that_does_not_come(tmp_path: Path) -> None:
    """One that waits for something else holds up the others for downtime-limit, and is counted."""
    path = tmp_path / "socket"
    command = [sys.executable, str(PROGRAM), "aio", str(path)]
    environment = {"UPGRADER_DOWNTIME_LIMIT": "100ms"}
    with Service(environment=environment) as service, contextlib.ExitStack() as stack:
        service.start(command)
        stuck, subscriber, publisher = (stack.enter_context(Client(path)) for _ in range(3))
        assert "subscribed" == subscriber.ask("subscribe")
        assert "1" == stuck.ask("stick")
        assert "" == subscriber.line()
        service.upgrade(command)

        assert "1" == publisher.ask("publish something")
        assert "something" == subscriber.line()
        assert "1 handlers of adopted connections have not come to their first" in service.stderr
