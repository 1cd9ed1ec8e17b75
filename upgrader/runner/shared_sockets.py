# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs change of the listeners that they share: flags, backlog, options; put back.

They are of the open file description, so what a new program sets, the old one has.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from upgrader.backends.listener import BACKLOG
from upgrader.errors import VerifyError

_TCP_INFO_BACKLOG = struct.Struct("28xI")  # struct tcp_info: tcpi_sacked, for a listener
#: RunnerOptions that servers set on listeners: (level, number).
_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
)


class SocketSettings:
    """The settings of one listener, as they were when this was made."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._blocking = os.get_blocking(sock.fileno())
        self._backlog = _backlog(sock)
        self._options = {each: _option(sock, *each) for each in _OPTIONS}

    def require_kept(self, program: str) -> None:
        """Raise VerifyError if O_NONBLOCK is another than before: a program that waits in accept(2)
        when it does not expect to answers nobody any more."""
        if os.get_blocking(self.sock.fileno()) is not self._blocking:
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
        os.set_blocking(self.sock.fileno(), True)
        self._blocking = True

    def listen_again(self) -> None:
        """Have it listen, which a program has shut down; raises OSError."""
        self.sock.listen(self._backlog or BACKLOG)

    def restore(self, *, options: bool) -> None:
        """Put back the backlog and O_NONBLOCK, and with `options` all that is known."""
        with contextlib.suppress(OSError):
            os.set_blocking(self.sock.fileno(), self._blocking)
            if self._backlog:
                self.sock.listen(self._backlog)
            for (level, number), value in self._options.items() if options else ():
                if value is not None and _option(self.sock, level, number) != value:
                    self.sock.setsockopt(level, number, value)


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


def record(sockets: Sequence[socket.socket]) -> list[SocketSettings]:
    """The settings of all of them."""
    return [SocketSettings(sock) for sock in sockets]
