# SPDX-License-Identifier: LGPL-2.1-or-later
"""State between versions of a program, up and down: nothing is reset, dropped or lost in silence."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import DEADLINE, Client
from upgrader.systemd.status import Origin, Status
from upgrader.testing import Service, ServiceError

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


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[Kv]:
    kv = Kv(tmp_path)
    with kv.service:
        yield kv


def test_p6_a_renamed_field_survives_up_and_down(kv: Kv) -> None:
    """It counts on in every direction, and what a downgrade drops is named at its depth."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        for number, version in enumerate((2, 1, 2, 2, 1), 2):
            status = kv.upgrade(version)

            assert (Origin.RESTART, 0) == (status.origin, status.left_behind)
            assert str(number) == client.ask("count")
            dropped = "state 'kv': dropped, unknown to this version: values[...].note"
            assert (dropped in kv.service.stderr) == (version == 1)
        assert "1" == client.ask("get a")


@pytest.mark.parametrize(
    ("versions", "without", "message"),
    [
        ((2, 1), "convert_back", r"state 'kv': version 2 has saved no commands, .*convert_back"),
        ((1, 2), "since", r"state 'kv': version 1 has saved no values\[...\].note, .*since\(2"),
    ],
)
def test_p6_a_field_that_nothing_explains_refuses_the_version(
    versions: tuple[int, int], without: str, message: str, kv: Kv
) -> None:
    """It is named, and the version before goes on with all that it had."""
    old, new = versions
    kv.start(old, without=without)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        with pytest.raises(ServiceError, match=message):
            kv.upgrade(new, without=without)
        kv.start(old)

        assert "1" == client.ask("get a")
        assert "3" == client.ask("count")
