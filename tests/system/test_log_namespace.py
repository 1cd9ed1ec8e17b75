# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with a journal of its own (LogNamespace=): causes and history are found there."""

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
