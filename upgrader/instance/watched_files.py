# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that a process was made of, as they were when it began, and whether they are others now.

What a file is called decides nothing, and its dates not everything: a backup sets the change time,
and another image may be mounted where the same inode has the same dates.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upgrader.protocol.later import later

if TYPE_CHECKING:
    import hashlib
else:
    hashlib = later("hashlib")

#: Larger files, such as an interpreter, are told by what stat(2) says alone.
_READ = 1 << 20
_DIGEST = 16  # bytes
_PAUSE = 0.001  # seconds


@dataclass(frozen=True, slots=True)
class _Seen:
    """One file at one time. `same` is what a new file never has in common with the old one; `place`
    and `changed` may differ for the same file, and then `digest` decides, empty if it is not known."""

    same: tuple[int, ...] = ()  # inode, size, time of modification
    place: int = 0  # device
    changed: int = 0  # ctime
    digest: bytes = b""

    def is_like(self, other: "_Seen") -> bool:
        """Whether stat(2) says the same of both."""
        return (self.same, self.place, self.changed) == (other.same, other.place, other.changed)


@dataclass(frozen=True, slots=True)
class Look:
    """What is on disk at one time. `changed`: the paths that are others now, and that only a new process
    takes note of; `reread`: those that a reload reads anew; `fingerprint`: all of the former as they
    are, in one checksum."""

    changed: list[str]
    reread: list[str]
    fingerprint: str


class WatchedFiles:
    """Files, and what they were at first; of a directory, which one a path names.

    Until `read` has been called, a file with other dates counts as another.
    """

    def __init__(self, began: int) -> None:
        """`began`: what is written after that, in nanoseconds of CLOCK_MONOTONIC, this process was not
        made of."""
        self._began = began
        self._files: dict[str, _Seen] = {}
        self._reread: dict[str, _Seen] = {}
        self._directories: dict[str, tuple[int, ...]] = {}
        self._known: dict[str, _Seen] = {}  # the last look at those that are others now

    def add(self, path: str, *, reread: bool = False) -> None:
        """Watch a file, which need not be there; `reread`: a reload reads it anew."""
        files = self._reread if reread else self._files
        path = os.path.abspath(path)
        if path not in files:
            files[path] = _stamp(path)

    def add_directory(self, path: str) -> None:
        """Watch which directory a path names, and not what is in it."""
        self._directories.setdefault(path, _directory(path))

    def add_program(self) -> None:
        """Watch the program, its interpreter and all modules; those written since this process has
        begun are of another version already."""
        now = time.time_ns()  # the clock may have been set since
        began = now - (time.monotonic_ns() - self._began)
        modules = list(sys.modules.values())
        paths = {getattr(module, "__file__", None) for module in modules}
        loaders = (getattr(module, "__loader__", None) for module in modules)
        paths |= {getattr(loader, "archive", None) for loader in loaders}  # modules in a zip
        paths |= {sys.executable, os.path.abspath(sys.argv[0])}
        for path in paths:
            if path and path not in self._files:
                seen = _stamp(path)
                self._files[path] = _Seen() if began < seen.changed <= now else seen

    def read(self) -> None:
        """Read those that are still the same, with a pause after each: for a large program that takes a
        tenth of a second, in which others want the interpreter."""
        for files in self._files, self._reread:
            for path, seen in list(files.items()):
                if not seen.digest and _stamp(path) == seen:
                    files[path] = _with_digest(path, seen)
                    time.sleep(_PAUSE)

    def look(self) -> Look:
        """Look at each of them once."""
        frozen = _never_written()
        found = [(path, seen, _stamp(path)) for path, seen in list(self._files.items())]
        changed = [path for path, seen, now in found if _is_other(path, seen, now, frozen)]
        directories = [(path, _directory(path)) for path in self._directories]
        changed += [path for path, now in directories if now != self._directories[path]]
        reread = [p for p, s in list(self._reread.items()) if _is_other(p, s, _stamp(p), frozen)]
        files = [(path, self._content(path, seen, now)) for path, seen, now in found]
        return Look(changed, reread, _checksum(files, directories))

    def before_reload(self) -> dict[str, _Seen]:
        """What a reload is about to read, for `reloaded`."""
        return {path: _with_digest(path, _stamp(path)) for path in list(self._reread)}

    def reloaded(self, seen: dict[str, _Seen]) -> None:
        """A reload has gone well."""
        self._reread.update(seen)

    def _content(self, path: str, seen: _Seen, now: _Seen) -> tuple[tuple[int, ...], bytes]:
        """Without the device and the change time, which are others after a boot."""
        for each in (seen, self._known.get(path)):
            if each and each.digest and each.is_like(now):
                return each.same, each.digest
        self._known[path] = now = _with_digest(path, now)
        return now.same, now.digest


def _is_other(path: str, seen: _Seen, now: _Seen, frozen: frozenset[int] | None) -> bool:
    if now.same != seen.same:
        return True
    if now.is_like(seen):
        # A file system that nobody writes to: whoever made it may have set all dates.
        if frozen is None or now.place not in frozen:
            return False
        return bool(seen.digest) and _digest(path, now) != seen.digest
    return not seen.digest or _digest(path, now) != seen.digest


def _checksum(*lists: list[Any]) -> str:
    return hashlib.sha256(repr(tuple(map(sorted, lists))).encode()).hexdigest()[:32]


def _never_written() -> frozenset[int] | None:
    """The devices of the file systems that nobody can write to now; None if nobody says."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            return frozenset(_read_only(file))
    except OSError:
        return None


def _read_only(lines: Iterable[str]) -> Iterator[int]:
    """proc_pid_mountinfo(5): the last field has the options of the file system, not of this mount."""
    for line in lines:
        fields = line.split()
        if "ro" in fields[-1].split(","):
            major, _, minor = fields[2].partition(":")
            yield os.makedev(int(major), int(minor))


def _stamp(path: str) -> _Seen:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return _Seen()
    same = (found.st_ino, found.st_size, found.st_mtime_ns)
    return _Seen(same, found.st_dev, found.st_ctime_ns)


def _with_digest(path: str, seen: _Seen) -> _Seen:
    return replace(seen, digest=_digest(path, seen))


def _digest(path: str, seen: _Seen) -> bytes:
    """A checksum of what is in a file; empty if it cannot be read, or takes too long."""
    if seen.same and seen.same[1] <= _READ:
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(number, "rb", buffering=0) as file:
                return hashlib.blake2b(file.read(_READ), digest_size=_DIGEST).digest()
    return b""


def _directory(path: str) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return ()
