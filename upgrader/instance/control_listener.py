# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make an instance's socket where callers look for it, and say who calls there."""

import contextlib
import fnmatch
import os
import select
import socket
import struct

import msgspec

from upgrader.protocol.fd import Fd
from upgrader.protocol.rendezvous import DRAINING, STATUS_SOCKET

#: The place of a socket before its place is free, by the name of that and a PID.
BESIDE = ".{}.{}"
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERPIDFD = 77  # Linux 6.5


class Caller(msgspec.Struct, frozen=True):
    """Who is at the other end: SO_PEERCRED, and a pidfd where the kernel gives one (6.5)."""

    pid: int
    uid: int
    pidfd: Fd | None = None

    @property
    def gone(self) -> bool:
        """Whether that process has ended, so that another one may have its number by now."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(0))


def caller_at(sock: socket.socket) -> Caller:
    """Who is at the other end of a connection."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(credentials)
    try:
        pidfd = Fd(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
    except OSError:  # an older kernel, or it has ended already
        return Caller(pid, uid)
    return Caller(pid, uid, pidfd)


class Places:
    """Where an instance listens: at a path and, for all users, at another one beside it; or at an abstract
    name. Who connects waits for whoever takes the listeners. At a path, nobody can before `open`."""

    def __init__(self, place: str) -> None:
        """`place`: a path, or an abstract name, which begins with a NUL. Raises OSError."""
        #: The path, empty for an abstract name.
        self.path = "" if place.startswith("\0") else place
        self.listeners: list[socket.socket] = []
        self.for_all: socket.socket | None = None  #: where one may only read
        self._inodes: dict[str, int] = {}
        self._wanted: dict[str, str] = {}
        if not self.path:
            self.listeners.append(listen(place))
            return
        try:
            self._listen_beside(place, 0o600)
            self.for_all = self._listen_beside(beside(place, STATUS_SOCKET), 0o666)
        except BaseException:
            self.close()
            raise

    def _listen_beside(self, path: str, mode: int) -> socket.socket:
        listener, bound = listen_beside(path, mode)
        self.listeners.append(listener)
        self._inodes[bound] = os.stat(bound).st_ino
        self._wanted[bound] = path
        return listener

    def open(self) -> None:
        """Take the place of the instance before, once; raises OSError."""
        if not self.path or not self._wanted:
            return
        names = [BESIDE.format(os.path.basename(path), "*") for path in self._wanted.values()]
        for bound, path in list(self._wanted.items()):
            self._inodes[path] = self._inodes.pop(bound)
            os.rename(bound, path)
            del self._wanted[bound]
        for pattern in (DRAINING.format("*"), *names):
            remove_dead(os.path.dirname(self.path), pattern)

    @property
    def taken(self) -> bool:
        """Whether callers find no listener of this instance any more where it was."""
        return not any(
            _inode(path) == self._inodes.get(path)
            for path in (self.path, beside(self.path, STATUS_SOCKET))
            if self.path
        )

    def also_at(self, path: str) -> socket.socket:
        """Listen at a second path, too; raises OSError."""
        listener, bound = listen_beside(path)
        os.rename(bound, path)
        self._inodes[path] = os.stat(path).st_ino
        self.listeners.append(listener)
        return listener

    def remove(self) -> None:
        """Give up the paths, except one that another instance has by now."""
        inodes, self._inodes = self._inodes, {}
        for path, inode in inodes.items():
            with contextlib.suppress(OSError):
                remove_own(path, inode)

    def close(self) -> None:
        """Give up the paths, and listen no more."""
        self.remove()
        for listener in self.listeners:
            listener.close()


def listen(name: str) -> socket.socket:
    """Listen at a path or an abstract name; raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def beside(path: str, name: str) -> str:
    """The path of this name in the same directory."""
    return os.path.join(os.path.dirname(path), name)


def listen_beside(path: str, mode: int = 0o600) -> tuple[socket.socket, str]:
    """Listen beside a place, to be renamed: the old instance's socket works until then, and there
    is no moment without one. `mode`: who may connect."""
    bound = beside(path, BESIDE.format(os.path.basename(path), os.getpid()))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bound)
    listener = listen(bound)
    try:
        os.chmod(bound, mode)
    except BaseException:
        listener.close()
        raise
    return listener, bound


def _inode(path: str) -> int:
    """Of what is at this path, -1 if nothing is."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def remove_own(path: str, inode: int) -> None:
    """Remove the socket with this inode, and no other that takes its path meanwhile; raises OSError.

    Between a look at the path and unlink(2) a new instance may take it, so the path is moved first.
    """
    if os.stat(path).st_ino != inode:
        return
    taken = beside(path, BESIDE.format(os.path.basename(path), f"{os.getpid()}.old"))
    os.rename(path, taken)
    try:
        if os.stat(taken).st_ino != inode:
            os.link(taken, path)  # fails if one that is newer still has come
    finally:
        os.unlink(taken)


def remove_dead(directory: str, pattern: str) -> None:
    """Remove sockets that nobody listens on: left by processes that were killed."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # a directory that one may only search
        names = os.listdir(directory)
    for name in fnmatch.filter(names, pattern):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
