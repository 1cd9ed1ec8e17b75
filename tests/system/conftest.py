# SPDX-License-Identifier: LGPL-2.1-or-later
"""What system tests share: services that are taken away again."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs and starts services: `install(machine, name, program, *lines of [Service])`."""
    with contextlib.ExitStack() as installed:

        def start(machine: PrivateSystemd, name: str, program: str, *more: str) -> Service:
            service = Service(machine, name, program, more)
            installed.callback(service.remove)
            service.start()
            return service

        yield start
