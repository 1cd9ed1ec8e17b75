# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs take away at their end: the files of UNIX listeners, and the PID file; put back.

They are the next program's as well. Each file of a listener has a hard link beside it, which is the same socket.
"""

import contextlib
import functools
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from upgrader.runner.options import Listen
from upgrader.runner.watched_paths import WatchedPaths

_log = logging.getLogger("upgrader")


class Paths:
    """The files of UNIX listeners, each with a hard link beside it, and the PID file."""

    def __init__(self, pid_file: str) -> None:
        self._pid_file = Path(pid_file) if pid_file else None
        self._pid = ""
        self._links: dict[Path, Path] = {}
        self._sockets: tuple[socket.socket, ...] = ()

    def keep(self, sockets: Iterable[socket.socket]) -> None:
        """Make the links, as far as this process may write there."""
        self._sockets = tuple(sockets)
        for sock in self._sockets:
            name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
            if not isinstance(name, str) or not name.startswith("/"):
                continue
            path = Path(name)
            link = _link(path)
            _put_back(path)
            try:
                inode = path.stat().st_ino
                if not (link.exists() and link.stat().st_ino == inode):
                    link.unlink(missing_ok=True)
                    os.link(path, link)
            except OSError as error:
                _log.warning("%s cannot be put back if it is removed: %s", path, error.strerror)
            else:
                self._links[path] = link

    def note_pid(self, pid: int) -> None:
        """The program that serves, should an old one remove the PID file, or one that is refused leave its own."""
        self._pid = f"{pid}\n"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Put back at once whatever goes away meanwhile, as long as this process has the listeners: an old
        program may remove it when it begins to drain, and drain for hours."""
        paths = [*self._links, *([self._pid_file] if self._pid_file else ())]
        try:
            watch = WatchedPaths(paths, self._restore_ours) if paths else None
        except OSError as error:
            _log.warning("files that are removed are put back late: %s", error.strerror)
            watch = None
        self.restore()  # what has gone before
        try:
            yield
        finally:
            if watch:
                watch.close()

    def _restore_ours(self) -> None:
        # What is closed is given up, with its file.
        if all(sock.fileno() >= 0 for sock in self._sockets):
            self.restore()

    def restore(self) -> None:
        """Put back what is missing or is another's."""
        for path, link in self._links.items():
            with contextlib.suppress(OSError):
                if not path.exists() or path.stat().st_ino != link.stat().st_ino:
                    _replace(path, functools.partial(os.link, link))
                    _log.info("%s was removed by an old program, and is back", path)
        if self._pid_file and self._pid and _text(self._pid_file).strip() != self._pid.strip():
            with contextlib.suppress(OSError):
                _replace(self._pid_file, self._write_pid)

    def _write_pid(self, path: Path) -> None:
        path.write_text(self._pid)

    def give_up(self) -> None:
        """The unit is stopped, and the library has removed the files of what was bound here: `restore` puts
        back what `.socket` units listen on, and no PID file."""
        self._pid = ""
        for path, link in [*self._links.items()]:
            if not path.exists():
                link.unlink(missing_ok=True)
                del self._links[path]

    def forget(self) -> None:
        """Remove the links."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.unlink()
        self._links.clear()


def put_back(listen: Iterable[Listen]) -> None:
    """Put back the files of listeners that an old program has removed while no runner was there to see it:
    before the next one looks for them, and binds them anew. Nobody need listen there any more."""
    for path in _paths(listen):
        _put_back(path)


def remove_links(listen: Iterable[Listen]) -> None:
    """Remove the links that a runner has left that was killed: its listeners are given up."""
    for path in _paths(listen):
        with contextlib.suppress(OSError):
            _link(path).unlink(missing_ok=True)


def _paths(listen: Iterable[Listen]) -> Iterator[Path]:
    for each in listen:
        if each.address and each.address.startswith("unix:/"):
            yield Path(each.address.removeprefix("unix:"))


def _text(path: Path) -> str:
    """What is in a file, empty if it is not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _link(path: Path) -> Path:
    return path.with_name(f".{path.name}.upgrader")


def _put_back(path: Path) -> None:
    """Put a file back that is missing, if there is a link."""
    link = _link(path)
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(link.lstat().st_mode):  # whoever else may write there
            os.link(link, path, follow_symlinks=False)
            _log.info("%s was removed by an old program, and is back", path)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside a path, and give it that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    make(beside)
    os.rename(beside, path)
