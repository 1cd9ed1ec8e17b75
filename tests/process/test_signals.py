# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals to an instance that systemd has started: which end it, and which do not."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.process.chat import Client
from tests.support import eventually
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("signalled.py")


@pytest.mark.parametrize("own", [False, True])
def test_u3_sighup(face: str, own: bool, tmp_path: Path) -> None:
    """It is a reload, unless the program has a handler of its own; the instance serves on."""
    path = tmp_path / "socket"
    with Service() as service:
        command = [sys.executable, str(PROGRAM), face, str(path), *["own"] * own]
        service.start(command)
        assert service.process
        with Client(path) as client:
            for times in (1, 2):
                os.kill(service.process.pid, signal.SIGHUP)
                wanted = str(times * (100 if own else 1))

                assert eventually(lambda: client.ask("reloads") == wanted)  # noqa: B023
            service.live(command)
            os.kill(service.process.pid, signal.SIGHUP)

            assert eventually(lambda: client.ask("reloads") == ("100" if own else "1"))
