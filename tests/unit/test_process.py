# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance does to its own process, which is its author's."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from upgrader.instance.process import no_collection


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
