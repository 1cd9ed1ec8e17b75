# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance does to its own process, which is its author's."""

import contextlib
import gc
import os
import resource
import weakref
from collections.abc import Iterator

import pytest

from upgrader.instance.process import free_numbers, no_collection


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
