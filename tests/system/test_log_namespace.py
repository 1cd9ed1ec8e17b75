# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that does not log to the journal of all: causes and history are found where it does."""

import json

import pytest

from tests.system.reloading import installed
from tests.system.serving import Install
from tests.system.tool import upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd


def test_u11_a_journal_of_its_own(any_machine: PrivateSystemd, install: Install) -> None:
    """What a version has written before it ended is the cause, and the history is complete."""
    if any_machine.run(
        ["systemctl", "start", "systemd-journald@own.socket"], check=False
    ).returncode:
        pytest.skip("this machine has no journals of their own")
    try:
        service = installed(any_machine, install, "apart", "LogNamespace=own")
        with service.connect() as client:
            assert (1, 1, 1) == client.add()
            service.environment(PORT="none")
            failed = upgrade(service)
            assert ("failed-old-serves", "live") == (failed["result"], failed["mode"])
            assert "none" in failed["cause"]
            service.environment(ROUND="2")
            assert "done" == upgrade(service)["result"]
            assert (2, 2, 2) == client.add()
        told = json.loads(upgrader(any_machine, "history", service.unit, "--json").stdout)
        assert {"source", "destination"} <= {each["side"] for each in told}
    finally:
        own = ["systemd-journald@own.service", "systemd-journald@own.socket"]
        any_machine.run(["systemctl", "stop", *own], check=False)


@pytest.mark.parametrize("mode", ["live", "restart"])
def test_u11_a_file_for_its_output(
    any_machine: PrivateSystemd, install: Install, mode: str
) -> None:
    """The exception with which a version ended before it could say anything is the cause."""
    lines = ["StandardOutput=append:/run/filed.log", "StandardError=append:/run/filed.log"]
    service = installed(any_machine, install, "filed", *lines)
    try:
        service.environment(PYTHONPATH="/run/broken")
        any_machine.write("/run/broken/asyncio.py", "raise ImportError('half installed')\n")
        failed = upgrade(service, "--mode", mode)

        assert "half installed" in failed["cause"], failed
    finally:
        any_machine.run(["rm", "-r", "/run/broken"])
        service.environment()
