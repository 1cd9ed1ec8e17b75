# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts of upgrades: none is lost, and a damaged file begins again."""

import threading
from pathlib import Path

from upgrader.tool import counts
from upgrader.tool.counts import Counts

UNIT = "web.service"


def test_many_at_a_time_are_all_counted(tmp_path: Path) -> None:
    """Two commands may end in the same moment."""
    results = [True, False, True, True] * 5
    threads = [threading.Thread(target=counts.add, args=(UNIT, done, tmp_path)) for done in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert Counts(done=15, failed=5) == counts.read(UNIT, tmp_path)
    assert Counts() == counts.read("other.service", tmp_path)


def test_a_damaged_file_counts_from_nothing(tmp_path: Path) -> None:
    """As a counter of Prometheus may."""
    (tmp_path / UNIT).write_text("{")
    counts.add(UNIT, True, tmp_path)

    assert Counts(done=1) == counts.read(UNIT, tmp_path)


def test_where_nothing_can_be_written_nothing_is_counted(tmp_path: Path) -> None:
    """And nothing fails: an upgrade is more than its count."""
    (tmp_path / "file").write_text("in the way")
    counts.add(UNIT, True, tmp_path / "file")

    assert Counts() == counts.read(UNIT, tmp_path / "file")
