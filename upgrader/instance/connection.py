# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection without a loop: its socket, what came and was not read, what was written and
did not go out; never blocks and calls nobody back."""

from __future__ import annotations

import contextlib
import socket
import time

from upgrader.backends import listener as listeners
from upgrader.instance.inbox import Inbox
from upgrader.protocol.kinds import Waiting, show_address
from upgrader.protocol.later import later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.protocol import connection_state, tls_state
    from upgrader.protocol import identity as identities
else:
    identities = later("upgrader.protocol.identity")

#: Above so many bytes of unread or unsent data, reading or writing waits.
HIGH_WATER = 65536


class ConnectionStream:
    """Both directions of a connection. `waiting` is its safe point, None while it is busy."""

    __slots__ = ("eof", "identity", "inbox", "lost", "since", "sock", "unsent", "waiting")

    what = ""  # only its handler knows
    ready = True  #: its handler may begin

    def __init__(
        self,
        sock: socket.socket,
        moved: connection_state.ConnectionState | None = None,
        identity: identities.Identity | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.since = time.monotonic()
        # Asked once, when there is time: thousands of them would make a pause of it.
        self.identity = identity or identities.identify(sock)
        self.inbox = Inbox(moved.unread if moved else b"")
        self.unsent = bytearray(moved.unsent if moved else b"")
        self.waiting: Waiting | None = moved.waiting if moved else None
        self.eof = False
        self.lost = False  #: the peer is gone; nothing can be sent any more

    def fileno(self) -> int:
        """The number of its FD, -1 once it is closed."""
        return self.sock.fileno()

    def receive(self) -> None:
        """Take what has come."""
        try:
            data = self.sock.recv(HIGH_WATER)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.lose()
            return
        if data:
            self._came(data)
        else:
            self._mark_ended()

    def queue(self, data: bytes) -> None:
        """Send what goes out at once, keep the rest; raises ConnectionResetError if it is lost."""
        if self.lost:
            raise ConnectionResetError(f"{show_peer(self.sock)}: the peer is gone")
        if self.unsent:
            self.unsent += data
            return
        sent = self._send(data)
        if sent < len(data):
            self.unsent += memoryview(data)[sent:]

    def flush(self) -> None:
        """Send more of what is kept."""
        if self.unsent:
            with memoryview(self.unsent) as view:
                sent = self._send(view)
            if self.lost:
                self.unsent.clear()
            else:
                del self.unsent[:sent]

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move, whatever its handler is at; empty if it can."""
        return ""

    def say_end(self) -> None:
        """Tell the client that nothing more comes, where that is a message of its own."""

    def snapshot(self) -> tuple[tls_state.TlsState, tls_state.TlsSecrets] | None:
        """What moves along besides bytes and session: with TLS."""
        return None

    def give_up(self) -> None:
        """It has moved: nothing is to be written here any more."""

    def close(self, *, shared: bool) -> None:
        """Close the connection; one that is `shared` ends for its client although another process
        still has a copy, as the instance before may for some milliseconds."""
        if shared:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def lose(self) -> None:
        """The peer is gone: nothing more comes and nothing more goes."""
        self._mark_lost()
        self.unsent.clear()

    def _came(self, data: bytes) -> None:
        self.inbox.buffer += data
        self.eof = False

    def _mark_ended(self) -> None:
        self.eof = True

    def _mark_lost(self) -> None:
        self.lost = self.eof = True

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._mark_lost()  # `data` may be a view of `unsent`, which cannot be cleared then
            return len(data)


def accept(listener: socket.socket) -> socket.socket | None:
    """Accept one connection for interactive traffic; None when there is none. Raises OSError."""
    try:
        sock, _ = listeners.accept(listener)
    except (BlockingIOError, InterruptedError, ConnectionAbortedError):
        return None
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def show_peer(owner: identities.HasFileno) -> str:
    """The address of the other end, for people."""
    try:
        with identities.borrowed(owner) as sock:
            return show_address(sock.getpeername()) or "unix peer"
    except OSError:
        return "gone peer"
