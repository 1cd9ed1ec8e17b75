# SPDX-License-Identifier: LGPL-2.1-or-later
"""What could not move and ends in the old instance, beside the new one: nothing holds it up."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from tests.support import eventually
from tests.system.reloading import installed, paused
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

#: Seconds that a request takes, and what may be added to that: a tenth of it is usual.
TAKES, LATE = 8.0, 3.0


@contextlib.contextmanager
def stopped(machine: PrivateSystemd) -> Iterator[None]:
    """PID 1 does nothing, as in a long daemon-reload."""
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(machine.pid, signal.SIGCONT)


def generation(service: Service) -> int:
    """Which instance answers a new client."""
    with service.connect() as client:
        return client.add()[2]


def test_systemd_is_stopped_at_the_commit(host_machine: PrivateSystemd, install: Install) -> None:
    """New clients are served by the new instance, and a response that is on its way in the old one
    comes in its time; systemd is told when it answers again, and everything is as always then."""
    service = installed(
        host_machine, install, "draining",
        "Environment=UPGRADER_BACKEND_TRANSFER=no UPGRADER_DOWNTIME_LIMIT=20s",
        program="lively",
    )  # fmt: skip
    with service.connect() as busy:
        asked = time.monotonic()
        busy.send(f"busy {TAKES}\n")
        with paused(service, "verify") as upgrade:
            with stopped(host_machine):
                upgrade.go()

                assert eventually(lambda: generation(service) == 2)
                assert time.monotonic() < asked + TAKES  # else nothing was on its way
                assert "done" == busy.line()
                assert time.monotonic() < asked + TAKES + LATE
                assert not upgrade.ended
            assert upgrade.wait(), service.messages()
            assert upgrade.destination == service.pid
            assert "" == busy.line()
    assert generation(service) == 2
