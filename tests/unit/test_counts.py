# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts of upgrades: none is lost, and a damaged file begins again."""

import threading
from pathlib import Path

from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import Migration
from upgrader.tool import counts
from upgrader.tool.counts import Counts

UNIT = "web.service"
DONE, FAILED = Migration(Phase.DONE, "live", 1, 2), Migration(Phase.FAILED, "live", 2)


def test_many_at_a_time_are_all_counted(tmp_path: Path) -> None:
    """Two commands may end in the same moment."""
    results = [DONE, FAILED, DONE, DONE] * 5
    threads = [threading.Thread(target=counts.add, args=(UNIT, each, tmp_path)) for each in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = counts.read(UNIT, tmp_path)
    assert (15, 5) == (found.done, found.failed)
    assert found.last in (DONE, FAILED)
    assert Counts() == counts.read("other.service", tmp_path)


def test_a_damaged_file_counts_from_nothing(tmp_path: Path) -> None:
    """As a counter of Prometheus may."""
    (tmp_path / UNIT).write_text("{")
    counts.add(UNIT, DONE, tmp_path)

    assert Counts(1, 0, DONE) == counts.read(UNIT, tmp_path)


def test_where_nothing_can_be_written_nothing_is_counted(tmp_path: Path) -> None:
    """And nothing fails: an upgrade is more than its count."""
    (tmp_path / "file").write_text("in the way")
    counts.add(UNIT, DONE, tmp_path / "file")

    assert Counts() == counts.read(UNIT, tmp_path / "file")
