# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache of root trees: one fetch, complete or not there; the real mmdebstrap is used by the system tests."""

import threading
from pathlib import Path

import pytest

from upgrader.lab.private_systemd import TreeError, suites

# Stands in for mmdebstrap: its second last argument but for a mirror is the place of the tree.
FAKE = """#!/bin/sh
echo run >>{log}
for place in "$@"; do case $place in *.partial) mkdir -p "$place/etc"; esac; done
{end}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mmdebstrap that writes to the log that is returned, and an empty cache."""
    log = tmp_path / "log"
    _install(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Without root there is no mount namespace to be had, and none is needed here.
    for name in ("unshare", "setpriv"):
        (tmp_path / "bin" / name).write_text(
            '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    return log


def _install(tmp_path: Path, end: str) -> None:
    program = tmp_path / "bin" / "mmdebstrap"
    program.parent.mkdir(exist_ok=True)
    program.write_text(FAKE.format(log=tmp_path / "log", end=end))
    program.chmod(0o755)


def test_a_tree_is_fetched_once(fake: Path) -> None:
    """The second call finds the tree of the first, and progress is told only about a fetch."""
    told: list[str] = []
    places = {suites.fetch("trixie", told.append) for _ in range(2)}

    assert {suites.cached_path("trixie")} == places
    assert "run\n" == fake.read_text()
    assert 1 == len(told)


def test_of_many_at_a_time_one_fetches(fake: Path) -> None:
    """Whoever comes while a tree is being fetched waits for it."""
    threads = [threading.Thread(target=suites.fetch, args=("trixie", str)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert "run\n" == fake.read_text()


def test_a_failure_says_why_and_leaves_nothing(fake: Path, tmp_path: Path) -> None:
    """The error has what mmdebstrap said; a later call tries again."""
    _install(tmp_path, "echo no such suite; exit 25")
    with pytest.raises(TreeError, match=r"root tree of sid[\s\S]*no such suite"):
        suites.fetch("sid", str)
    assert not suites.cached_path("sid").exists()
    assert not list(suites.cache_directory().glob("*.partial"))
    _install(tmp_path, "exit 0")

    assert suites.fetch("sid", str).exists()


def test_what_an_interrupted_fetch_left_is_replaced(fake: Path) -> None:
    """A half made tree is never used."""
    place = suites.cached_path("trixie")
    partial = place.with_name(f"{place.name}.partial")
    (partial / "half").mkdir(parents=True)

    assert not (suites.fetch("trixie", str) / "half").exists()


def test_without_mmdebstrap_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy names the package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(TreeError, match="apt-get install mmdebstrap"):
        suites.fetch("trixie", str)
