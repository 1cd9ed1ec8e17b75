# SPDX-License-Identifier: LGPL-2.1-or-later
"""Protocols of ours that stand between a transport and its library: at its beginning, while its connection
is held, and at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # TLS is loaded where its connections move
    from upgrader.aio.hosted_connection import HostedConnection
    from upgrader.aio.tls_layer import TlsLayer


class Newcomer(asyncio.Protocol):
    """The first protocol of every transport: makes way for the library's at once, so that what
    has moved along unread is the first that the library reads."""

    def __init__(
        self,
        protocol: asyncio.BaseProtocol,
        unread: bytes,
        on_made: Callable[[asyncio.Transport, asyncio.BaseProtocol], object],
    ) -> None:
        self._protocol = protocol
        self._unread = unread
        self._on_made = on_made
        self._lost = False
        self.layer: TlsLayer | None = None  #: below a transport of TLS, before that is made

    def data_received(self, data: bytes) -> None:
        """Over TLS, something may come with the end of the handshake."""
        self._unread += data

    def connection_lost(self, exc: Exception | None) -> None:
        """It came and went: the library need not know."""
        self._lost = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the transport to the library."""
        if self._lost:
            return
        made = cast(asyncio.Transport, transport)
        made.set_protocol(self._protocol)
        self._protocol.connection_made(made)
        if self._unread:
            cast(asyncio.Protocol, self._protocol).data_received(self._unread)
        self._on_made(made, self._protocol)


class Watch(asyncio.Protocol):
    """Passes everything, and notes the end."""

    def __init__(self, inner: asyncio.Protocol) -> None:
        self.inner = inner
        self.lost = False

    def data_received(self, data: bytes) -> None:
        """Pass it."""
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass it."""
        return self.inner.eof_received()

    def pause_writing(self) -> None:
        """Pass it."""
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it."""
        self.inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it, and pass it."""
        self.lost = True
        self.inner.connection_lost(exc)


class Gate(Watch):
    """Keeps what comes for an idle connection, or for any (`keeps_all`); everything else passes."""

    def __init__(
        self, hosted: HostedConnection, inner: asyncio.Protocol, *, keeps_all: bool
    ) -> None:
        super().__init__(inner)
        self.held = bytearray()
        self.paused = False
        self._hosted = hosted
        self._keeps_all = keeps_all

    def data_received(self, data: bytes) -> None:
        """Keep it, or pass it."""
        if not (self.held or self._keeps_all or self._hosted.wants_next):
            super().data_received(data)
            return
        self.held += data
        if not self.paused or self._keeps_all:  # the library may have resumed it meanwhile
            self.paused = True
            self._hosted.transport.pause_reading()
