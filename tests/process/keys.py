# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service of kv.py, as the tests use it."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.process.chat import DEADLINE, Client
from upgrader.protocol.status_text import Status
from upgrader.testing import Service

PROGRAM = Path(__file__).with_name("kv.py")


class Kv:
    """The service of kv.py, in the versions that a test asks for."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self.service = Service(timeout=DEADLINE)

    def command(self, version: int, **options: Any) -> list[str]:
        options = {"bind": f"unix:{self.path}", "version": version, **options}
        return [sys.executable, str(PROGRAM), json.dumps(options)]

    def start(self, version: int, **options: Any) -> Status:
        return self.service.start(self.command(version, **options))

    def upgrade(self, version: int, **options: Any) -> Status:
        return self.service.upgrade(self.command(version, **options))

    def connect(self) -> Client:
        return Client(self.path)

    @property
    def pid(self) -> int:
        assert self.service.process is not None
        return self.service.process.pid
