# SPDX-License-Identifier: LGPL-2.1-or-later
"""Says in each line that the library logs which generation says it; sends none itself.

Of two instances that run side by side, both write to the journal of one unit.
"""

import logging
import weakref
from typing import Protocol


class Generated(Protocol):
    """What knows its generation: 0 until it does."""

    @property
    def said_generation(self) -> int:
        """The generation, or the one that it is about to be."""


class _Label(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._instance: weakref.ref[Generated] | None = None

    def belong_to(self, instance: Generated) -> None:
        self._instance = weakref.ref(instance)

    def filter(self, record: logging.LogRecord) -> bool:
        instance = self._instance() if self._instance else None
        generation = instance.said_generation if instance else 0
        record.generation = generation
        if generation:
            record.msg = f"generation {generation}: {record.msg}"
        return True


_label = _Label()
logging.getLogger("upgrader").addFilter(_label)


def label_lines(instance: Generated) -> None:
    """From now on, lines are this instance's; one instance is one process."""
    _label.belong_to(instance)
