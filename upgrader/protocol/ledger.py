# SPDX-License-Identifier: LGPL-2.1-or-later
"""The few bytes beside an image that both sides may write, whoever dies: how often it was tried to load it,
and whether its source serves again."""

import os
import struct

from upgrader.errors import ProtocolError
from upgrader.protocol.fd import Fd

_LEDGER = struct.Struct("!I")  # attempts to load this image
_OPEN, _TAKEN_BACK = b"\0", b"\1"  # behind it: whether the source of a live image serves again


def count_attempt(ledger: Fd) -> int:
    """Count one more attempt to load an image; returns how many there were before."""
    number = ledger.fileno()
    try:
        (attempts,) = _LEDGER.unpack(os.pread(number, _LEDGER.size, 0) or bytes(_LEDGER.size))
        os.pwrite(number, _LEDGER.pack(attempts + 1), 0)
    except (OSError, struct.error) as error:
        raise ProtocolError("ledger", f"cannot be kept: {error}") from error
    return int(attempts)


def new_ledger() -> Fd:
    """The file that goes with an image and that both sides may write, whoever dies."""
    ledger = Fd(os.memfd_create("upgrader-ledger", os.MFD_CLOEXEC))
    os.write(ledger.fileno(), _LEDGER.pack(0) + _OPEN)
    return ledger


def take_back(ledger: Fd) -> None:
    """Say, before the source serves again, that its image is worth nothing any more."""
    os.pwrite(ledger.fileno(), _TAKEN_BACK, _LEDGER.size)


def is_taken_back(ledger: Fd) -> bool:
    """Whether the source of an image has served again; anything unclear counts as yes."""
    try:
        return os.pread(ledger.fileno(), 1, _LEDGER.size) != _OPEN
    except OSError:
        return True
