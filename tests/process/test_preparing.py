# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a new version prepares while the old one serves: with lent sockets, and with FDs that are kept."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually
from upgrader.codes import Code
from upgrader.testing import Service, ServiceError


class Preparing:
    """The program under test, and what its versions have noted."""

    def __init__(self, face: str, directory: Path) -> None:
        self.service = Service()
        self.path = directory / "socket"
        self.place = directory / "notes"
        self._face = face

    def command(self, version: str) -> list[str]:
        program = str(Path(__file__).with_name("preparing.py"))
        return [sys.executable, program, self._face, version, str(self.path), str(self.place)]

    def notes(self) -> list[str]:
        """What was noted since the last call."""
        found = self.place.read_text().splitlines()
        self.place.write_text("")
        return found

    def kept(self) -> list[str]:
        return sorted(name for name, _ in self.service.store if "kept" in name)


@pytest.fixture
def preparing(face: str, tmp_path: Path) -> Iterator[Preparing]:
    made = Preparing(face, tmp_path)
    with made.service:
        yield made


def test_a_live_upgrade(preparing: Preparing) -> None:
    """It has the listener before the source gives anything away; what it keeps, PID 1 has, and it is
    in `passed` once it is loaded."""
    preparing.service.start(preparing.command("1"))
    assert [f"1 prepares at {preparing.path} with []", "1 has ['of-1']"] == preparing.notes()

    preparing.service.live(preparing.command("2"))

    assert [
        f"2 prepares at {preparing.path} with ['/memfd:1 (deleted)']",
        "2 has ['of-1', 'of-2']",
    ] == preparing.notes()
    assert ["upgrader-entry-kept.of-1", "upgrader-entry-kept.of-2"] == preparing.kept()


def test_a_version_that_is_refused(preparing: Preparing) -> None:
    """The source is told what it had kept for that, and PID 1 gives it up before the caller is told."""
    preparing.service.start(preparing.command("1"))
    preparing.notes()
    with pytest.raises(ServiceError, match="not with me") as refused:
        preparing.service.live(preparing.command("bad"))

    assert Code.VERIFY_FAILED == refused.value.code
    told = "1 sees that nothing came of ['of-bad']"
    assert [
        f"bad prepares at {preparing.path} with ['/memfd:1 (deleted)']",
        told,
    ] == preparing.notes()
    assert ["upgrader-entry-kept.of-1"] == preparing.kept()


@pytest.mark.parametrize("face", ["aio"])
def test_nobody_waits_any_more(preparing: Preparing) -> None:
    """On asyncio, what is prepared is cancelled as soon as takeover is gone."""
    preparing.service.start(preparing.command("1"))
    upgrade = preparing.service.begin_live(preparing.command("slow"))
    assert eventually(lambda: "slow prepares" in preparing.place.read_text())
    assert upgrade._takeover
    os.kill(upgrade._takeover.pid, signal.SIGKILL)
    with pytest.raises(ServiceError):
        upgrade.wait()

    assert eventually(lambda: "slow is cancelled" in preparing.place.read_text())
    assert eventually(lambda: ["upgrader-entry-kept.of-1"] == preparing.kept())
