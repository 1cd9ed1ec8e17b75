# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saying something to all connections: nobody waits for who does not read."""

import contextlib
import sys
from pathlib import Path

from tests.process.chat import Client
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("channels.py")
SIZE = 1_000_000
PAGE = "x" * SIZE


def test_a_broadcast_waits_for_nobody(face: str, tmp_path: Path) -> None:
    """A subscriber that does not read misses what is beyond the limit, the others get all of it;
    what was queued for it moves along, and it has the rest as soon as it reads again."""
    path = tmp_path / "socket"
    command = [sys.executable, str(PROGRAM), face, str(path)]
    with Service() as service, contextlib.ExitStack() as stack:
        service.start(command)
        slow, quick, publisher = (stack.enter_context(Client(path)) for _ in range(3))
        assert ["subscribed"] * 2 == [client.ask("subscribe") for client in (slow, quick)]

        def broadcast() -> str:
            missed = publisher.ask(f"broadcast {SIZE}")
            assert PAGE == quick.line()
            return missed

        assert ["0 of 3", "0 of 3", "1 of 3", "1 of 3"] == [broadcast() for _ in range(4)]
        service.upgrade(command)
        assert "1 of 3" == broadcast()
        assert [PAGE] * 2 == [slow.line() for _ in range(2)]
        assert "0 of 3" == broadcast()
        assert PAGE == slow.line()
