# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS connections of a library that move: what lies below the transport that the library has.

asyncio and uvloop make the handshake and the transport as ever. The transport of the socket is made
first, by itself, so that what lies unsent in it is seen, and reading from it can be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, cast

from upgrader.errors import ImageError
from upgrader.protocol.identity import borrowed
from upgrader.protocol.tls_state import TlsSecrets, TlsState
from upgrader.tls.listener import Arrival, TlsListener
from upgrader.tls.moved import Moved

ONLY_LIVE = "TLS connections move in a live upgrade only"
_NOT_TAKEN = "the new version does not take TLS connections"
_TRUST = "the new version trusts other certificates of clients, or one cannot tell"


class TlsCrossing:
    """Whether the TLS connections of one listener may move now."""

    def __init__(self, listener: TlsListener) -> None:
        self.listener = listener
        self.refused = ONLY_LIVE  #: why none of them may; empty if they may

    @property
    def trust(self) -> str:
        """As `TlsListener.trust`."""
        return self.listener.trust

    def ask(self, *, live: bool, trust: str | None) -> None:
        """`trust`: what decides in the new instance which certificates of clients are taken; None if it
        takes no TLS connections."""
        if not live:
            self.refused = ONLY_LIVE
        elif trust is None:
            self.refused = _NOT_TAKEN
        else:
            own = self.trust
            self.refused = "" if own and own == trust else _TRUST

    @staticmethod
    def load(state: TlsState, secrets: TlsSecrets) -> Moved:
        """A connection that has moved here; raises ImageError for what cannot be one."""
        try:
            return Moved(state, secrets)
        except ValueError as error:
            raise ImageError("TLS connection", str(error)) from error

    async def connect(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.Protocol,
        moved: Moved | None,
    ) -> tuple[asyncio.Transport, TlsLayer]:
        """A TLS transport for a connection that was accepted, or has moved here: `connection_made` is
        not called, and `protocol` may have data before. Raises whatever the handshake does."""
        arrival = Arrival(moved)
        arrival.expect()
        raw, first = await loop.connect_accepted_socket(_First, sock)
        if moved:
            moved.send_alert = lambda record: _send_at_once(raw, record)
        if raw.is_closing():
            raise ConnectionResetError("it is gone")
        arrival.early = first.data
        made = await loop.start_tls(raw, protocol, self.listener.context, server_side=True)
        if made is None:
            raise ConnectionResetError("it is gone")
        return made, TlsLayer(self, made.get_extra_info("ssl_object"), raw)


class TlsLayer:
    """What lies below the transport of one connection."""

    __slots__ = ("_crossing", "_raw", "_ssl_object")

    def __init__(self, crossing: TlsCrossing, ssl_object: Any, raw: asyncio.Transport) -> None:
        """`ssl_object`: a Tapped or a Moved; `raw`: the transport of the socket."""
        self._crossing = crossing
        self._ssl_object = ssl_object
        self._raw = raw

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move; empty if it can."""
        return self._crossing.refused or str(self._ssl_object.why_it_stays)

    @property
    def unsent(self) -> int:
        """Bytes that are sealed and not sent."""
        return self._raw.get_write_buffer_size()

    def snapshot(self) -> tuple[TlsState, TlsSecrets]:
        """What goes on elsewhere; nothing may be read or written after this unless it stays."""
        state, secrets = self._ssl_object.snapshot()
        return state, secrets

    def give_up(self) -> None:
        """It has moved: nothing here reads from its socket any more or seals anything, and our copy of
        its FD is closed. It is never left with systemd, so nobody needs that."""
        self._ssl_object.give_up()
        self._raw.abort()


class _First(asyncio.Protocol):
    """Reads nothing on asyncio; uvloop reads once before anybody can say no."""

    def __init__(self) -> None:
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).pause_reading()

    def data_received(self, data: bytes) -> None:
        self.data += data


def _send_at_once(raw: asyncio.Transport, record: bytes) -> None:
    """Send an alert: after an error a loop drops all that is not sent. If anything is, it must not
    overtake that, and is dropped, too."""
    sock = raw.get_extra_info("socket")
    if raw.get_write_buffer_size() or sock is None:
        return
    with contextlib.suppress(OSError), borrowed(sock) as own:
        own.send(record, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
