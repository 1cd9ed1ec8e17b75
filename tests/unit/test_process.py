# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance does to its own process, which is its author's."""

import contextlib
import gc
import os
import re
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from upgrader.instance.process import free_numbers
from upgrader.protocol.collector import no_collection


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """As a program finds it that has not touched it; what other tests have left is put back."""
    was_enabled = gc.isenabled()
    gc.enable()
    gc.unfreeze()
    gc.collect()
    yield
    gc.unfreeze()
    if not was_enabled:
        gc.disable()


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_of_a_migration_is_collected_later(fails: bool) -> None:
    """What was garbage before, and what has become garbage meanwhile, whether it fails or not."""
    found = [weakref.ref(Cycle())]
    try:
        with no_collection():
            assert not gc.isenabled()
            found.append(weakref.ref(Cycle()))
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert gc.isenabled()
    assert 0 == gc.get_freeze_count()
    gc.collect()

    assert [None, None] == [each() for each in found]


def test_a_young_collection_does_not_look_at_what_was_loaded() -> None:
    """Thousands of objects that are there to stay would be walked while clients wait."""
    with no_collection():
        found = weakref.ref(Cycle())
    gc.collect(0)

    assert found() is not None


def test_what_the_program_does_with_the_collector_stays() -> None:
    """One that has switched it off, or frozen what it has, finds it so."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    gc.disable()
    with no_collection():
        pass

    assert not gc.isenabled()
    assert 0 < gc.get_freeze_count() <= frozen


def test_free_numbers() -> None:
    """Those below the limit: none is left once all are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        lowest = os.dup(0)
        os.close(lowest)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3, hard))
        assert 3 == free_numbers()
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))

        assert 0 == free_numbers()


def test_the_table_of_fds_does_not_grow_while_it_is_served(tmp_path: Path) -> None:
    """The kernel has all threads of a process wait for 10 to 20 ms for a larger one; see proc(5) on
    FDSize. An instance has its one before there is any thread, also with few FDs allowed."""
    script = tmp_path / "program.py"
    script.write_text(
        "import upgrader\n"
        "with upgrader.attach('table'):\n"
        "    print(open('/proc/self/status').read())\n"
    )
    for allowed, wanted in (16384, 16384), (300, 256):
        command = ["prlimit", f"--nofile={allowed}:{allowed}", sys.executable, script]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        size = re.search(r"^FDSize:\s+(\d+)$", said, re.MULTILINE)

        assert int(size[1] if size else 0) >= wanted
