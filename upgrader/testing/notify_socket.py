# SPDX-License-Identifier: LGPL-2.1-or-later
"""What processes tell PID 1 by sd_notify(3), and the FDs that they store with it."""

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from upgrader.protocol.fd import Fd, received

_DUPFD_QUERY = 1027
_KCMP = {"x86_64": 312, "i686": 349}  # elsewhere it is the number that newer architectures share


class NotifySocket:
    """NOTIFY_SOCKET and the FD store of a service, until `close`.

    `heard` is called with the fields of each message, in a thread, while `lock` is held; `news` is
    notified after it.
    """

    def __init__(self, path: Path, heard: Callable[[Mapping[str, str]], None]) -> None:
        self.path = path
        self.store: list[tuple[str, Fd]] = []  #: each FD and its name
        self.lock = threading.RLock()  #: held while the store or what `heard` notes changes
        self.news = threading.Condition(self.lock)
        self._heard = heard
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._closing, self._closed = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="notify")
        self._thread.start()

    def settle(self) -> None:
        """Wait until all that a process sent before its end has been handled."""
        reading, writing = os.pipe()
        with Fd(reading) as end:
            with Fd(writing), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(str(self.path))
                socket.send_fds(sock, [b"BARRIER=1"], [writing])
            os.read(end.fileno(), 1)

    def close(self) -> None:
        """Hear nothing more, and forget what is stored."""
        self._closing.close()
        self._thread.join()
        self._closed.close()
        self._sock.close()
        for _, fd in self.store:
            fd.close()
        self.store.clear()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._closed, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self._sock.fileno() in ready:
                with self.news:
                    self._receive()
                    self.news.notify_all()
            elif ready:
                return

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(253 * 4)
        data, ancillary, _, _ = self._sock.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
        fds = received(ancillary)
        fields = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            self.store = [item for item in self.store if item[0] != name]
        elif fields.get("FDSTORE") == "1":
            self.store += [(name, fd) for fd in fds if not self._stored(fd)]
        self._heard(fields)

    def _stored(self, fd: Fd) -> bool:
        return any(same_open_file(fd.fileno(), known.fileno()) for _, known in self.store)


def same_open_file(one: int, other: int) -> bool:
    """Whether two FDs of this process are of one open file, as PID 1 asks before it stores one: all
    eventfds have one inode, and a file may be open twice. Raises OSError where neither fcntl(2) nor
    kcmp(2) says it."""
    with contextlib.suppress(OSError):  # F_DUPFD_QUERY, Linux 6.10
        return fcntl.fcntl(one, _DUPFD_QUERY, other) == 1
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        _KCMP.get(os.uname().machine, 272), os.getpid(), os.getpid(), 0, one, other
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), "kcmp")
    return bool(result == 0)
