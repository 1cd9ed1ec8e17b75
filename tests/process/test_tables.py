# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table that changes crosses in rounds, while its service goes on; whatever ends one changes nothing."""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually
from tests.tables import publish
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin, Status
from upgrader.testing import Service, ServiceError
from upgrader.testing.live import describe

PROGRAM = Path(__file__).with_name("stock.py")
SIZE = 5_000_000
#: Items that a destination has loaded in the middle of the first round, and in a later one.
FIRST, LATER = SIZE // 2000, SIZE // 1000 + 200
HEAD = [
    "table", "it changes by", "copied in all", "upgrade", "pause",
    "p99 of how late a task was, of what it was before",
]  # fmt: skip


class Stock:
    """The service of stock.py."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.path = directory / "socket"
        self.mark = directory / "mark"
        self.service = Service(timeout=DEADLINE, environment={**os.environ, **environment})

    def command(self, version: int = 1, **options: Any) -> list[str]:
        options = {
            "bind": f"unix:{self.path}", "bytes": SIZE, "rate": 1_000_000, "version": version,
            "mark": str(self.mark), **options,
        }  # fmt: skip
        return [sys.executable, str(PROGRAM), json.dumps(options)]

    def start(self, **options: Any) -> Status:
        status = self.service.start(self.command(**options))
        assert eventually(lambda: int(self.ask("size")) > SIZE // 2000)
        return status

    def live(self, version: int = 1, **options: Any) -> Status:
        return self.service.live(self.command(version, **options))

    def ask(self, question: str) -> str:
        with Client(self.path) as client:
            return client.ask(question)

    @property
    def migration(self) -> dict[str, Any]:
        found: dict[str, Any] = describe(self.service)["migration"]
        return found

    @property
    def pid(self) -> int:
        assert self.service.process is not None
        return self.service.process.pid


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Stock]:
    # The first round takes a second, so that there is a second round.
    stock = Stock(tmp_path, UPGRADER_MAX_BANDWIDTH="5000K")
    with stock.service:
        yield stock


def test_a_table_crosses_while_it_changes(stock: Stock) -> None:
    """To the same version, to one with another field in each item, and back; into a restart as well."""
    stock.start()
    for number, version in enumerate((1, 2, 2, 1), 2):
        status = stock.live(version)

        assert (number, Origin.LIVE) == (status.generation, status.origin)
        assert status.state_bytes > SIZE // 2
        assert "ok" == stock.ask("check")
    assert Origin.RESTART is stock.service.upgrade(stock.command(2)).origin
    assert "ok" == stock.ask("check")


def test_what_is_insured_of_a_table(stock: Stock) -> None:
    """All that there was at the switchover, in the pieces that have crossed."""
    stock.start()
    stock.live()
    stock.service.kill()

    assert Origin.INSURANCE is stock.service.start(stock.command(2)).origin
    assert "ok" == stock.ask("check")
    stock.live()
    assert "ok" == stock.ask("check")


def test_a_table_of_a_program_without_asyncio(stock: Stock) -> None:
    """Between two turns of its loop; its clients are answered meanwhile."""
    stock.service.start(stock.command(blocking=True))
    with Client(stock.path) as client, ThreadPoolExecutor(1) as pool:
        client.ask(f"write {SIZE // 1000}")
        for version, options in ((2, {"way": "raises", "at": FIRST}), (1, {}), (2, {})):
            upgrade = pool.submit(stock.live, version, blocking=True, **options)
            while not upgrade.done():
                client.ask("write 20")
                time.sleep(0.01)  # of a megabyte or two a second
            if options:
                with pytest.raises(ServiceError, match="not with me"):
                    upgrade.result()
                assert stock.migration["round"]
            else:
                assert upgrade.result().state_bytes > SIZE // 2
            assert "ok" == client.ask("check")


WAYS = [("dies", FIRST, Code.ENDED_EARLY), ("raises", LATER, Code.STATE_UNREADABLE)]
MORE_WAYS = [
    ("dies", LATER, Code.ENDED_EARLY), ("raises", FIRST, Code.STATE_UNREADABLE),
    ("waits", FIRST, Code.NOT_READY_IN_TIME), ("waits", LATER, Code.NOT_READY_IN_TIME),
]  # fmt: skip


@pytest.mark.parametrize(
    "ways", [WAYS, pytest.param(MORE_WAYS, marks=pytest.mark.matrix)], ids=["some", "others"]
)
def test_whatever_ends_a_round_changes_nothing(
    ways: list[tuple[str, int, Code]], stock: Stock
) -> None:
    """In the first round or in a later one; the source goes on, and can be upgraded then."""
    stock.start()
    before = stock.pid
    for way, at, code in ways:
        with pytest.raises(ServiceError) as caught:
            stock.live(2, way=way, at=at)

        assert code == caught.value.code, caught.value
        assert (before, "ok") == (stock.pid, stock.ask("check"))
    with pytest.raises(ServiceError, match="not with me"):
        stock.live(2, refuses=True)
    assert stock.migration["round"]
    assert stock.migration["copied"] > SIZE // 2
    assert "ok" == stock.ask("check")
    stock.live(2)
    assert "ok" == stock.ask("check")


def test_a_round_is_called_off(stock: Stock) -> None:
    """The destination is in the middle of one."""
    stock.start()
    upgrade = stock.service.begin_live(stock.command(2, way="waits", at=FIRST))
    assert eventually(stock.mark.exists)
    assert stock.ask("check").endswith("_Recorded")
    upgrade.abort()

    assert "ok" == stock.ask("check")
    stock.live()
    assert "ok" == stock.ask("check")


def percentile(late: list[float]) -> float:
    return sorted(late)[len(late) * 99 // 100]


def measure(stock: Stock, size: int, rate: int) -> tuple[float, list[str]]:
    """One upgrade of a table of so many bytes, of which `rate` a second change: its pause, and a line."""
    late = stock.path.with_name("late")
    options = {"bytes": size, "rate": rate}
    stock.service.start(stock.command(late=str(late), **options))
    assert eventually(lambda: int(stock.ask("size")) > size // 2000)
    time.sleep(3)  # what is measured as the time before
    began = time.monotonic()
    status = stock.service.live(stock.command(**options))
    ended = time.monotonic()
    assert "ok" == stock.ask("check")
    assert eventually(late.exists)
    ticks = [(due, by) for due, by in json.loads(late.read_text()) if due > began - 3]
    before = percentile([by for due, by in ticks if due <= began])
    during = percentile([by for due, by in ticks if began < due <= ended])
    assert status.pause is not None
    return status.pause, [
        f"{size / 1e6:.0f} MB", f"{rate / 1e6:.0f} MB/s", f"{status.state_bytes / 1e6:.0f} MB",
        f"{ended - began:.1f} s", f"{status.pause * 1e3:.1f} ms", f"{during / before:.1f}",
    ]  # fmt: skip


@pytest.mark.matrix
def test_the_pause_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """However large it is, and while it changes: also how late a task of the source was, that is due
    every two milliseconds, before the upgrade and during it."""
    rows, pauses = [], []
    for size, rate in ((5, 1), (50, 1), (200, 1), (200, 10), (200, 30)):
        place = tmp_path / f"{size} {rate}"
        place.mkdir()
        stock = Stock(place)
        with stock.service:
            pause, row = measure(stock, size * 1_000_000, rate * 1_000_000)
            rows.append(row)
            pauses.append(pause)
    publish("tables", HEAD, rows)
    assert max(pauses) < 0.1
