# SPDX-License-Identifier: LGPL-2.1-or-later
"""The garbage collector stands still while somebody waits and what is made is there to stay."""

from __future__ import annotations

import contextlib
import gc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Put off garbage collection: hardly any of thousands of new objects is garbage, and clients or a
    start wait. What there is afterwards counts as old, so that only full collections look at it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else the program has frozen some itself, for good
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if enabled:
            gc.enable()
