# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection with a handler that speaks TLS: what is read and written is plain, what is kept unsent is
sealed. It never blocks and calls nobody back."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Any

from upgrader.instance.connection import HIGH_WATER, ConnectionStream

if TYPE_CHECKING:
    from upgrader.aio.tls_layer import TlsCrossing
    from upgrader.protocol.connection_state import ConnectionState
    from upgrader.protocol.identity import Identity
    from upgrader.protocol.tls_state import TlsSecrets, TlsState
    from upgrader.tls.moved import Moved

_KEYS = "the keys of TLS cannot move"
_log = logging.getLogger("upgrader")


class TlsStream(ConnectionStream):
    """Both directions of a connection over TLS."""

    __slots__ = ("_crossing", "_incoming", "_outgoing", "ready", "ssl_object")

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        crossing: TlsCrossing | None,
        state: ConnectionState | None = None,
        identity: Identity | None = None,
        moved: Moved | None = None,
    ) -> None:
        """`crossing`: whether such connections move; `moved`: what has moved here with it."""
        super().__init__(sock, state, identity)
        self._crossing = crossing
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ready = moved is not None  #: its handshake is done
        self.ssl_object: Any = moved
        if moved is None:
            self.ssl_object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
            return
        moved.attach(context, self._incoming, self._outgoing)
        moved.send_alert = self._outgoing.write
        self._advance()

    def queue(self, data: bytes) -> None:
        """Seal data, send what goes out at once, keep the rest; raises ConnectionResetError if it is
        lost."""
        if not self.lost and data:
            try:
                self.ssl_object.write(data)
            except ssl.SSLError as error:
                self._fail(error)
        super().queue(self._outgoing.read())

    def say_end(self) -> None:
        """Tell the client that nothing more comes."""
        if self.ready and not self.lost:
            with contextlib.suppress(ssl.SSLError):  # it waits for the client's end, and we do not
                self.ssl_object.unwrap()
            self._send_sealed()

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move; empty if it can."""
        if not self.ready:
            return "its TLS handshake is not finished"
        if self._crossing is None:
            return _KEYS
        return self._crossing.refused or str(self.ssl_object.why_it_stays)

    def snapshot(self) -> tuple[TlsState, TlsSecrets]:
        """What goes on elsewhere besides the bytes."""
        state, secrets = self.ssl_object.snapshot()
        return state, secrets

    def give_up(self) -> None:
        """It has moved: nothing is sealed here any more."""
        if self._crossing and self.ready:
            self.ssl_object.give_up()

    def _came(self, data: bytes) -> None:
        self._incoming.write(data)
        self._advance()

    def _advance(self) -> None:
        """Open what has come, and send what that asks for."""
        try:
            if not self.ready:
                self.ssl_object.do_handshake()
                self.ready = True
            while data := self.ssl_object.read(HIGH_WATER):
                self.inbox.buffer += data
            self._mark_ended()
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, OSError) as error:  # OSError: an alert that says so in OpenSSL's way
            self._send_sealed()  # an alert
            self._fail(error)
            return
        self._send_sealed()

    def _send_sealed(self) -> None:
        if self._outgoing.pending and not self.lost:
            super().queue(self._outgoing.read())

    def _fail(self, error: Exception) -> None:
        _log.debug("%s: %s", self.identity.address, error)
        self.inbox.buffer.clear()
        self.lose()
