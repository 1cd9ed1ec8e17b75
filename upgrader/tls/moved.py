# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection that has moved here, as asyncio and uvloop take it: a record layer behind the methods of
an SSLObject. Its handshake was another process's; no context is needed for the rest. RFC 8446, 4.6.3 to 6.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, NoReturn

from upgrader.protocol.tls_state import TlsSecrets, TlsState
from upgrader.tls.keys import SUITES, Direction, Refused
from upgrader.tls.wire import (
    HEADER,
    MAX_DATA,
    MAX_RECORD,
    UPDATE,
    UPDATE_REQUESTED,
    Alert,
    Content,
    length_of,
    take,
    whole,
)

#: Records under one key after which it is changed, and those after which it is used no more:
#: RFC 8446, section 5.5, allows 2^24.5 to AES-GCM.
UPDATE_AT, LAST = 1 << 23, 23_726_566
#: Records in a row that bring no data, after which a connection ends: the number is OpenSSL's.
_DRY = 32
_FATAL, _WARNING = 2, 1
_BITS = {"TLS_AES_128_GCM_SHA256": 128}  # of a key, as `cipher` tells; 256 for the others


class Moved(ssl.SSLObject):
    """What asyncio and uvloop take for their SSLObject. Whatever the handshake alone could answer, and
    did not move along, raises NotImplementedError."""

    def __init__(self, state: TlsState, secrets: TlsSecrets) -> None:
        """Raises ValueError for what cannot be a connection; seals nothing."""
        suite = SUITES.get(state.suite)
        if suite is None or not 1 <= state.limit <= MAX_DATA:
            raise ValueError(f"no TLS connection: {state.suite}, records of {state.limit} bytes")
        self._state = state
        self._client = Direction(suite, secrets.client, state.received)
        self._server = Direction(suite, secrets.server, state.sent)
        self._held = bytearray(state.ciphertext)
        self._plain = b""  # opened, and not read
        self._owes_update = state.owes_update
        self._asked_update = False
        self._dry = 0
        self._ended = self._said_end = self._given = False
        self._broken = ""
        self._context: ssl.SSLContext | None = None
        self._incoming = self._outgoing = ssl.MemoryBIO()
        #: Sends an alert at once: both loops drop what they hold after an error.
        self.send_alert: Callable[[bytes], object] = lambda record: None

    def attach(
        self,
        context: ssl.SSLContext,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        early: bytes = b"",
    ) -> None:
        """Read from `incoming` from now on, after what was read `early`, and write to `outgoing`."""
        self._context = context
        self._held += early
        self._incoming, self._outgoing = incoming, outgoing

    # What a loop calls

    def do_handshake(self) -> None:
        """It was made before."""

    def read(self, size: int = 1024, buffer: Any = None) -> Any:
        """As ssl.SSLObject's: data, nothing at the end that the client has announced; raises
        SSLWantReadError, or SSLError for what must not come: an alert is sent then."""
        while not (self._plain or self._ended):
            self._require_whole()
            self._open_next()
        data = self._plain[:size]
        self._plain = self._plain[size:]
        if buffer is None:
            return data
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        """As ssl.SSLObject's; raises SSLError once the connection has moved on."""
        self._require_whole()
        if self._said_end:
            raise ssl.SSLError("its end has been said")
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, self._state.limit):
            self._renew_keys()
            part = bytes(view[start : start + self._state.limit])
            self._outgoing.write(self._seal(Content.DATA, part))
        return view.nbytes

    def unwrap(self) -> Any:
        """As ssl.SSLObject's: say the end, and wait for the client's; what else comes is dropped."""
        if self._given:
            return None
        if not (self._said_end or self._broken):
            self._said_end = True
            alert = bytes((_WARNING, Alert.CLOSE_NOTIFY))
            self._outgoing.write(self._seal(Content.ALERT, alert))
        while not self._ended:
            self._require_whole()
            self._open_next()
            self._plain = b""
        return None

    def pending(self) -> int:
        """Bytes that a read may give at once; as `Tapped.pending`."""
        return len(self._plain) + whole(self._held)

    # What programs ask

    @property
    def context(self) -> ssl.SSLContext:
        """That of the listener, here."""
        assert self._context
        return self._context

    @context.setter
    def context(self, context: ssl.SSLContext) -> None:
        self._not_here()

    @property
    def session(self) -> Any:
        """Raises NotImplementedError: it is OpenSSL's."""
        self._not_here()

    @session.setter
    def session(self, session: Any) -> None:
        self._not_here()

    @property
    def session_reused(self) -> bool:
        """As before the move."""
        return self._state.resumed

    @property
    def server_side(self) -> bool:
        """Always: only connections of servers move."""
        return True

    @property
    def server_hostname(self) -> None:
        """None, as at every server."""
        return

    def version(self) -> str:
        """TLSv1.3: no other moves."""
        return "TLSv1.3"

    def cipher(self) -> tuple[str, str, int]:
        """As before the move."""
        return self._state.suite, "TLSv1.3", _BITS.get(self._state.suite, 256)

    def compression(self) -> None:
        """None: TLS 1.3 has none."""

    def selected_alpn_protocol(self) -> str | None:
        """As before the move."""
        return self._state.alpn

    def getpeercert(self, binary_form: bool = False) -> Any:
        """As before the move."""
        state = self._state
        return state.certificate if binary_form else _with_tuples(state.certificate_fields)

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """As before the move; raises ValueError for another type."""
        if cb_type != "tls-unique":
            raise ValueError(f"{cb_type} channel binding did not move along")
        return self._state.channel_binding

    def shared_ciphers(self) -> Any:
        """Raises NotImplementedError."""
        self._not_here()

    def verify_client_post_handshake(self) -> NoReturn:
        """Raises NotImplementedError."""
        self._not_here()

    def __getattr__(self, name: str) -> NoReturn:
        # What a newer Python's SSLObject has besides asks its `_sslobj`; there is none.
        if name == "_sslobj":
            self._not_here()
        raise AttributeError(name)

    def _not_here(self) -> NoReturn:
        raise NotImplementedError("the TLS connection has moved here, and this did not")

    # What a migration asks

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move on; empty if it can."""
        if self._ended or self._said_end or self._broken:
            return "it is being closed"
        return "part of a record has not been read" if self._plain else ""

    def snapshot(self) -> tuple[TlsState, TlsSecrets]:
        """As `Tapped.snapshot`."""
        self._held += self._incoming.read()
        state = TlsState(
            self._state.suite, self._client.count, self._server.count, bytes(self._held),
            self._owes_update, self._state.limit, self._state.alpn, self._state.resumed,
            self._state.certificate, self._state.certificate_fields, self._state.channel_binding,
        )  # fmt: skip
        return state, TlsSecrets(self._client.secret, self._server.secret)

    def give_up(self) -> None:
        """As `Tapped.give_up`."""
        self._given = True
        del self._client, self._server

    # Inside

    def _require_whole(self) -> None:
        if self._given:
            raise ssl.SSLError("the connection is another instance's")
        if self._broken:
            raise ssl.SSLError(f"the TLS connection has failed: {self._broken}")

    def _open_next(self) -> None:
        """Take one record; raises SSLWantReadError if there is none, SSLError if it must not be."""
        if self._incoming.pending:
            self._held += self._incoming.read()
        try:
            if length_of(self._held) > HEADER + MAX_RECORD:
                raise Refused(Alert.RECORD_OVERFLOW, "a record that is too long")
            record = take(self._held)
            if not record:
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "no whole record is there")
            if record[0] != Content.DATA:
                raise Refused(Alert.UNEXPECTED_MESSAGE, "a record that is not sealed")
            if self._client.count >= LAST:
                raise Refused(Alert.UNEXPECTED_MESSAGE, "a key that has been used too often")
            self._handle(*self._client.open(record))
        except Refused as refused:
            self._fail(refused)
        if self._client.count >= UPDATE_AT and not (self._asked_update or self._said_end):
            self._asked_update = True
            self._outgoing.write(self._seal(Content.HANDSHAKE, UPDATE_REQUESTED))
            self._server.update()

    def _handle(self, kind: int, data: bytes) -> None:
        if len(data) > MAX_DATA:
            raise Refused(Alert.RECORD_OVERFLOW, "a record with too much data")
        if kind == Content.DATA and data:
            self._dry = 0
            self._plain = data
            return
        self._dry += 1
        if self._dry > _DRY:
            raise Refused(Alert.UNEXPECTED_MESSAGE, "too many records without data")
        if kind == Content.HANDSHAKE:
            self._update(data)
        elif kind == Content.ALERT:
            self._alerted(data)
        elif kind != Content.DATA:
            raise Refused(Alert.UNEXPECTED_MESSAGE, f"a record of kind {kind}")

    def _update(self, message: bytes) -> None:
        if message[:1] != UPDATE[:1]:
            raise Refused(Alert.UNEXPECTED_MESSAGE, "a handshake message after the handshake")
        if len(message) != len(UPDATE) or message[:-1] != UPDATE[:-1]:
            raise Refused(Alert.DECODE_ERROR, "a KeyUpdate that is none")
        if message[-1] > 1:
            raise Refused(Alert.ILLEGAL_PARAMETER, "a KeyUpdate that asks for neither")
        self._client.update()
        self._asked_update = False
        if message == UPDATE_REQUESTED and not self._said_end:
            self._owes_update = True
            self._renew_keys()

    def _alerted(self, alert: bytes) -> None:
        if len(alert) != 2:
            raise Refused(Alert.DECODE_ERROR, "an alert that is none")
        if alert[1] == Alert.CLOSE_NOTIFY:
            self._ended = True
        elif alert[1] != Alert.USER_CANCELED:
            self._broken = f"the client has sent alert {alert[1]}"
            raise ssl.SSLError(self._broken)

    def _renew_keys(self) -> None:
        """Send a KeyUpdate that is owed, or due."""
        if self._owes_update or self._server.count >= UPDATE_AT:
            self._owes_update = False
            self._outgoing.write(self._seal(Content.HANDSHAKE, UPDATE))
            self._server.update()

    def _seal(self, kind: int, data: bytes) -> bytes:
        if self._server.count >= LAST:
            self._broken = "its key has been used too often"
            self._require_whole()
        return self._server.seal(kind, data)

    def _fail(self, refused: Refused) -> NoReturn:
        self._broken = str(refused)
        self._plain = b""
        if not self._said_end and self._server.count < LAST:
            self.send_alert(self._server.seal(Content.ALERT, bytes((_FATAL, refused.alert))))
        raise ssl.SSLError(self._broken) from refused


def _with_tuples(value: Any) -> Any:
    """As `ssl` has it: what came as a list was a tuple there."""
    if isinstance(value, list | tuple):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return value
