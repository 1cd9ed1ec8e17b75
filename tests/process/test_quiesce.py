# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author has done before a freeze, and at the end of a replaced instance."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually
from upgrader.codes import Code
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("spool.py")
LINES = 300


class Spool:
    """The service of spool.py."""

    def __init__(self, face: str, directory: Path) -> None:
        self.face = face
        self.path = directory / "socket"
        self.spans = directory / "spans"
        self.service = Service(timeout=DEADLINE)

    def command(self, **options: Any) -> list[str]:
        options = {
            "face": self.face, "bind": f"unix:{self.path}", "spans": str(self.spans), **options,
        }  # fmt: skip
        return [sys.executable, str(PROGRAM), json.dumps(options)]

    def written(self) -> list[str]:
        return self.spans.read_text().splitlines() if self.spans.exists() else []


@pytest.fixture
def spool(face: str, tmp_path: Path) -> Any:
    spool = Spool(face, tmp_path)
    with spool.service:
        yield spool


@pytest.mark.parametrize("mode", ["live", "restart"])
def test_p9_what_was_queued_is_done_before_a_freeze_and_spans_are_sent_after_it(
    mode: str, spool: Spool
) -> None:
    """Nothing that was acknowledged is lost, though it lay in a queue, and no span either."""
    spool.service.start(spool.command())
    with Client(spool.path) as client:
        client.send("line\n" * LINES)
        assert ["queued"] * LINES == [client.line() for _ in range(LINES)]
        if mode == "live":
            spool.service.live(spool.command())
        else:
            spool.service.upgrade(spool.command())

        assert str(LINES) == client.ask("count")
        assert eventually(lambda: len(spool.written()) == LINES)
        assert f"line {LINES} of generation 1" == spool.written()[-1]
    spool.service.stop(for_good=True)
    assert LINES == len(spool.written())


@pytest.mark.parametrize(
    ("flush", "code", "why"),
    [
        ("fails", Code.SOURCE_FAILED, "flush has raised ValueError: no flush"),
        ("hangs", Code.BUSY_WORK, "flush"),
    ],
)
def test_p9_a_quiesce_that_does_not_work_out_refuses(
    flush: str, code: Code, why: str, spool: Spool
) -> None:
    """A live upgrade: the instance serves on. A restart cannot be refused: it is told, and goes on."""
    spool.service.environment.update(
        UPGRADER_DRAIN_TIMEOUT="200ms", UPGRADER_MIGRATION_TIMEOUT="2s"
    )
    spool.service.start(spool.command(flush=flush))
    with Client(spool.path) as client:
        assert "queued" == client.ask("line")
        with pytest.raises(ServiceError, match=why) as refused:
            spool.service.live(spool.command())
        assert code is refused.value.code
        assert eventually(lambda: client.ask("count") == "1")
        assert eventually(lambda: "served on" in spool.written())
        spool.service.stop()
        assert "called for a restart" in spool.service.stderr
        spool.service.start(spool.command())
        assert "1" == client.ask("count")
