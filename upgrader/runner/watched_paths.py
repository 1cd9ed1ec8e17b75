# SPDX-License-Identifier: LGPL-2.1-or-later
"""Being told at once if files are removed or replaced, by inotify(7), on the asyncio loop."""

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from upgrader.protocol.fd import Fd

_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW = 0x4000  # events were lost
_EVENT = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name
_MOST = 65536  # bytes of events at a time


class WatchedPaths:
    """The directories of some files."""

    def __init__(self, paths: Iterable[Path], on_change: Callable[[], object]) -> None:
        """Call `on_change` whenever one of them may be another one; raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._on_change = on_change
        self._names = {os.fsencode(path.name) for path in paths}
        self._fd = Fd(_checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)))
        try:
            for place in {path.parent for path in paths}:
                mask = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
                _checked(libc.inotify_add_watch(self._fd.fileno(), os.fsencode(place), mask))
        except OSError:
            self._fd.close()
            raise
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def close(self) -> None:
        """Watch no more."""
        asyncio.get_running_loop().remove_reader(self._fd)
        self._fd.close()

    def _read(self) -> None:
        data, changed = os.read(self._fd.fileno(), _MOST), False
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            changed |= name in self._names or bool(mask & _OVERFLOW)
            data = data[_EVENT.size + length :]
        if changed:
            self._on_change()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
