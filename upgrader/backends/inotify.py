# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches of files and directories, and the events that nobody has read yet. inotify(7)."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, TypedDict

from upgrader.backends.fdinfo import anonymous, texts
from upgrader.backends.kind import BackendKind
from upgrader.backends.libc import call
from upgrader.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

_NONBLOCK, _CLOEXEC = 0o4000, 0o2000000  # IN_NONBLOCK, IN_CLOEXEC


class InotifyFacts(TypedDict):
    """`watches`: as the kernel shows them, number, inode, device and mask; `paths`: by the number."""

    watches: list[str]
    paths: dict[int, str]


class Inotify(BackendKind, name="inotify"):
    """A non-blocking inotify instance without watches, until `watch` adds some. `paths` says which watch
    is of what: the kernel knows only inodes."""

    facts = InotifyFacts
    #: What was said of watches is older than those that the new instance has added.
    replayable = False

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}  #: the path of each watch, by its number

    def open(self) -> int:
        """Make a new one."""
        self.paths.clear()
        return call("inotify_init1", _NONBLOCK | _CLOEXEC)

    def watch(self, path: str | os.PathLike[str], mask: int) -> int:
        """Add a watch, or change its mask (IN_*); returns its number, which is in its events. Raises
        OSError, and as `fileno`."""
        text = os.fspath(path)
        number = call("inotify_add_watch", self.fileno(), os.fsencode(text), ctypes.c_uint32(mask))
        self.paths[number] = text
        return number

    def refuse(self, fd: int) -> str:
        """Say why it is no inotify instance."""
        return "" if anonymous(fd) == "inotify" else "it is no inotify instance"

    def describe(self, fd: int) -> InotifyFacts:
        """Give all watches."""
        return {"watches": _watches(fd), "paths": dict(self.paths)}

    def verify(self, fd: int, said: Mapping[str, Any]) -> None:
        """Raise MismatchError for a watch that was not said. One that is missing was of a file that is
        gone: its last event says so."""
        found, known = _watches(fd), said["watches"]
        if not set(found) <= set(known) or (known and not found):
            raise MismatchError(self._item, known, found)

    def adopt(self, said: Mapping[str, Any]) -> None:
        """Know the paths."""
        self.paths = dict(said["paths"])

    def show(self, fd: int) -> str:
        """Count the watches."""
        return f"{len(_watches(fd))} watches"


def _watches(fd: int) -> list[str]:
    found = []
    for name in (
        "inotify wd",
        "inotify",
    ):  # "inotify wd:1 ino:2b sdev:1f mask:2 ignored_mask:0 ..."
        found += [" ".join(text.split()[:4]) for text in texts(fd, name)]
    return sorted(found)
