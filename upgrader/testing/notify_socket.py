# SPDX-License-Identifier: LGPL-2.1-or-later
"""What processes tell PID 1 by sd_notify(3), and the FDs that they store with it."""

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from upgrader.protocol.fd import Fd, received


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
        same = os.fstat(fd.fileno())
        return any(os.path.samestat(same, os.fstat(known.fileno())) for _, known in self.store)
