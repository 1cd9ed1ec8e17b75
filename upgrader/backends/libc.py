# SPDX-License-Identifier: LGPL-2.1-or-later
"""Functions of the C library that Python 3.11 has no names for."""

from __future__ import annotations

import ctypes
import os


def call(name: str, *arguments: object) -> int:
    """What a function of the C library returns; raises OSError with its errno if that is negative."""
    result = int(getattr(_LIBRARY, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


_LIBRARY = ctypes.CDLL(None, use_errno=True)
