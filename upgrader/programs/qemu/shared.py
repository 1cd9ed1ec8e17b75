# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all QEMUs of one machine share, whichever of them it runs in: its memory, its network devices, and
a note of what it is."""

import os

import msgspec

from upgrader.backends.tap import TapFacts
from upgrader.errors import VerifyError
from upgrader.protocol.fd import Fd

MEMORY = "memory"
NOTE = "machine"
TAP = "tap."  #: before the name of an interface
_LARGEST = 1 << 20  # bytes of a note


class Note(msgspec.Struct, frozen=True):
    """What the machine is: its versioned `type`, and the one that was `written` for it; the `command` line
    that it began with.

    While it moves, or an attempt of that has not been undone: `moving`; `status`: what it did before;
    `devices`: how its guest wants the device of each interface.
    """

    type: str
    written: str
    command: list[str]
    moving: bool = False
    status: str = "running"
    devices: dict[str, TapFacts] = {}


def make_memory(size: int) -> Fd:
    """Memory of so many bytes for a guest; none of it is used yet."""
    fd = Fd(os.memfd_create("guest-memory"))
    os.ftruncate(fd.fileno(), size)
    return fd


def empty_memory(fd: Fd, size: int) -> None:
    """Give back what was in it: the machine begins anew."""
    os.ftruncate(fd.fileno(), 0)
    os.ftruncate(fd.fileno(), size)


def make_note() -> Fd:
    """A note with nothing in it."""
    return Fd(os.memfd_create("machine"))


def write_note(fd: Fd, note: Note) -> None:
    """Replace what it says."""
    data = msgspec.json.encode(note)
    os.pwrite(fd.fileno(), data, 0)
    os.ftruncate(fd.fileno(), len(data))


def read_note(fd: Fd) -> Note | None:
    """What it says, None for one with nothing in it; raises VerifyError for nonsense."""
    data = os.pread(fd.fileno(), _LARGEST, 0)
    if not data:
        return None
    try:
        return msgspec.json.decode(data, type=Note)
    except msgspec.MsgspecError as error:
        raise VerifyError(f"what is known of the machine cannot be read: {error}") from error
