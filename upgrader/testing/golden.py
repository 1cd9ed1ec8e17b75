# SPDX-License-Identifier: LGPL-2.1-or-later
"""States that an earlier version has written, kept in the author's repository."""

from pathlib import Path
from typing import TypeVar

import msgspec

from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import load, save

T = TypeVar("T")


def save_golden(value: object, path: Path) -> None:
    """Write a state to a file, to be kept in your repository for `assert_readable`."""
    path.write_bytes(msgspec.msgpack.encode(save(value)))


def assert_readable(cls: type[T], path: Path) -> T:
    """Load a state that an earlier version wrote with `save_golden`; raises as an upgrade would."""
    saved = msgspec.msgpack.decode(path.read_bytes(), type=SavedState)
    return load(cls, saved)[0]
