# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs change of the listeners that they share: flags, backlog, options, files; put back.

They are of the open file description (or of the file), so what a new program sets, the old one has,
and what an old one takes away, the new one lacks.
"""

import contextlib
import functools
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from upgrader.backends.listener import BACKLOG
from upgrader.errors import VerifyError
from upgrader.runner.watched_paths import WatchedPaths

_TCP_INFO_BACKLOG = struct.Struct("28xI")  # struct tcp_info: tcpi_sacked, for a listener
#: RunnerOptions that servers set on listeners: (level, number).
_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
)
_log = logging.getLogger("upgrader")


class SocketSettings:
    """The settings of one listener, as they were when this was made."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._blocking = os.get_blocking(sock.fileno())
        self._backlog = _backlog(sock)
        self._options = {each: _option(sock, *each) for each in _OPTIONS}

    def require_kept(self, program: str) -> None:
        """Raise VerifyError if O_NONBLOCK is another than before: a program that waits in accept(2)
        when it does not expect to answers nobody any more."""
        if os.get_blocking(self._sock.fileno()) is not self._blocking:
            raise VerifyError(
                f"{program} has changed O_NONBLOCK of a listener that another one serves",
                remedy="restart the unit instead",
            )

    def require_blocking(self, *, beside: bool) -> None:
        """Turn O_NONBLOCK off, for a program that waits in accept(2); raises VerifyError if another one
        may serve `beside` it, which does not."""
        if self._blocking:
            return
        if beside:
            raise VerifyError(
                "the program waits in accept(2), and the one that serves its listeners does not",
                remedy="stop and start the unit instead",
            )
        os.set_blocking(self._sock.fileno(), True)
        self._blocking = True

    def restore(self, *, options: bool) -> None:
        """Put back the backlog and O_NONBLOCK, and with `options` all that is known."""
        with contextlib.suppress(OSError):
            os.set_blocking(self._sock.fileno(), self._blocking)
            if self._backlog:
                self._sock.listen(self._backlog)
            for (level, number), value in self._options.items() if options else ():
                if value is not None and _option(self._sock, level, number) != value:
                    self._sock.setsockopt(level, number, value)


def _option(sock: socket.socket, level: int, number: int) -> int | None:
    try:
        return sock.getsockopt(level, number)
    except OSError:
        return None


def _backlog(sock: socket.socket) -> int:
    """The backlog of a listener, 0 for a datagram socket. That of a UNIX one is not told: the most."""
    if sock.type != socket.SOCK_STREAM:
        return 0
    if sock.family == socket.AF_UNIX:
        return BACKLOG
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BACKLOG.size)
    return int(_TCP_INFO_BACKLOG.unpack(info)[0])


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
            link = path.with_name(f".{path.name}.upgrader")
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
        """The program that serves, should an old one remove the PID file."""
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
        if self._pid_file and self._pid and not self._pid_file.exists():
            with contextlib.suppress(OSError):
                _replace(self._pid_file, self._write_pid)

    def _write_pid(self, path: Path) -> None:
        path.write_text(self._pid)

    def forget(self) -> None:
        """Remove the links: the listeners are given up."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.unlink()
        self._links.clear()


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside a path, and give it that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    make(beside)
    os.rename(beside, path)


def record(sockets: Sequence[socket.socket]) -> list[SocketSettings]:
    """The settings of all of them."""
    return [SocketSettings(sock) for sock in sockets]
