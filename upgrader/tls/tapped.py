# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection that OpenSSL has accepted, watched so closely that it could go on elsewhere.

OpenSSL gets one whole record at a time, so how many it has opened and sealed is known, and what it has
not been given is here. A record that gave it no data is opened here as well: a KeyUpdate changes the
keys, and no key log tells that. What cannot be explained makes the connection stay.
"""

from __future__ import annotations

import ssl
from typing import Any, Self, cast

from upgrader.protocol.tls_state import TlsSecrets, TlsState
from upgrader.tls.key_log import KeyLog, traffic_secrets
from upgrader.tls.keys import SUITES, Direction, Refused
from upgrader.tls.wire import (
    HEADER,
    KINDS,
    MAX_OLD_RECORD,
    UPDATE,
    UPDATE_REQUESTED,
    ClientHello,
    Content,
    length_of,
    take,
    whole,
)

_STRANGE = "a record of it cannot be explained"
_CLOSING = "it is being closed"


class Tapped(ssl.SSLObject):
    """What asyncio and uvloop take for their SSLObject; `why_it_stays` is empty if it can move."""

    # An SSLObject has no constructor: `begin` fills these in.
    _log: KeyLog
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _to_openssl: ssl.MemoryBIO
    _from_openssl: ssl.MemoryBIO
    _held: bytearray  # came, and OpenSSL has not got it
    _lines: list[tuple[str, ...]]
    _messages: bytearray  # of the handshake, until the ClientHello is there
    _hello: ClientHello | None = None
    _client: Direction | None = None
    _server: Direction | None = None
    _client_proven = False  # has opened a record
    _server_proven = False
    _owes_update = False
    _watched = True  # else OpenSSL gets all that comes
    _given = False
    _why = "its handshake is not finished"

    @classmethod
    def begin(
        cls,
        log: KeyLog,
        context: ssl.SSLContext,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        early: bytes = b"",
        **options: Any,
    ) -> Self:
        """A connection of a context whose key log is `log`; `early` was read before what `incoming`
        will have, and `options` are those of `wrap_bio`."""
        made_in, made_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self = cast(Self, cls._create(made_in, made_out, context=context, **options))  # type: ignore[attr-defined]
        self._log = log
        self._incoming, self._outgoing = incoming, outgoing
        self._to_openssl, self._from_openssl = made_in, made_out
        self._held, self._messages, self._lines = bytearray(early), bytearray(), []
        return self

    # What a loop calls

    def do_handshake(self) -> None:
        """As ssl.SSLObject's."""
        while True:
            try:
                with self._log.during(self._lines):
                    super().do_handshake()
                self._why = self._completed()
                return
            except ssl.SSLWantReadError:
                if not self._feed_handshake():
                    raise
            finally:
                self._flush()

    def read(self, size: int = 1024, buffer: Any = None) -> Any:
        """As ssl.SSLObject's."""
        record = b""
        while not self._given:
            try:
                data = super().read(size, buffer) if buffer is not None else super().read(size)
            except ssl.SSLWantReadError:
                if record and not self._why:
                    self._explain(record)
                record = self._feed()
                if not record:
                    raise
                continue
            except ssl.SSLError:
                self._why = _CLOSING
                raise
            finally:
                if self._from_openssl.pending:
                    self._flush()
            if not data and size:
                self._why = _CLOSING
            elif record and not self._why:
                self._gave_data(record)
            return data
        raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "it has moved")

    def write(self, data: Any) -> int:
        """As ssl.SSLObject's; raises SSLError once the connection has moved."""
        if self._given:
            raise ssl.SSLError("the connection is another instance's")
        try:
            return super().write(data)
        finally:
            self._flush()

    def unwrap(self) -> None:
        """As ssl.SSLObject's."""
        if self._given:
            return
        self._why = _CLOSING
        while True:
            try:
                super().unwrap()
                return
            except ssl.SSLWantReadError:
                if not self._feed():
                    raise
            finally:
                self._flush()

    def pending(self) -> int:
        """Bytes that a read may give at once. uvloop goes on reading while there are any, so whole
        records that OpenSSL has not got are counted."""
        return super().pending() + whole(self._held)

    # What a migration asks

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move; empty if it can."""
        if self._why:
            return self._why
        if super().pending():
            return "part of a record has not been read"
        return "" if self._server_proven else "its keys have opened no record yet"

    def snapshot(self) -> tuple[TlsState, TlsSecrets]:
        """All that goes on elsewhere; nothing changes, but nothing may be read or written after this
        unless the connection stays."""
        assert self._client
        assert self._server
        assert self._hello
        self._held += self._incoming.read()
        cipher = self.cipher()
        assert cipher
        state = TlsState(
            cipher[0],
            self._client.count,
            self._server.count,
            bytes(self._held),
            self._owes_update,
            self._hello.limit,
            self.selected_alpn_protocol(),
            self.session_reused or False,
            self.getpeercert(True),
            self.getpeercert(),
            self.get_channel_binding("tls-unique"),
        )
        return state, TlsSecrets(self._client.secret, self._server.secret)

    def give_up(self) -> None:
        """It has moved: nothing is sealed or opened here any more, no alert either."""
        self._given = True
        self._client = self._server = None

    # Inside

    def _completed(self) -> str:
        """The handshake is done: why the connection cannot move."""
        lines, self._lines = self._lines, []
        if self.version() != "TLSv1.3":
            return f"it speaks {self.version()}"
        cipher = self.cipher()
        suite = SUITES.get(cipher[0]) if cipher else None
        if suite is None:
            return "its cipher suite does not move"
        secrets = traffic_secrets(lines, self._hello.random) if self._hello else None
        if secrets is None:
            return "its keys are not known for certain"
        self._client, self._server = (Direction(suite, secret) for secret in secrets)
        return ""

    def _feed_handshake(self) -> bool:
        record = self._feed()
        if record and self._hello is None and record[0] == Content.HANDSHAKE:
            self._messages += record[HEADER:]
            try:
                self._hello = ClientHello.find(self._messages)
            except ValueError:
                self._unwatch("its ClientHello is not understood")
            if self._hello:
                self._messages.clear()
        return bool(record)

    def _feed(self) -> bytes:
        """Give OpenSSL the next whole record; empty if there is none."""
        if self._incoming.pending:
            self._held += self._incoming.read()
        if not self._held:
            return b""
        if self._watched and (
            self._held[0] not in KINDS or length_of(self._held) > HEADER + MAX_OLD_RECORD
        ):
            self._unwatch(_STRANGE)
        if self._watched:
            record = take(self._held)
        else:
            record = bytes(self._held)
            self._held.clear()
        if record:
            self._to_openssl.write(record)
        return record

    def _unwatch(self, why: str) -> None:
        self._watched = False
        self._why = why

    def _gave_data(self, record: bytes) -> None:
        client = self._client
        assert client
        if self._client_proven:
            client.count += 1
            return
        try:
            kind, _ = client.open(record)
        except Refused:
            kind = 0
        self._client_proven = kind == Content.DATA
        if not self._client_proven:
            self._why = _STRANGE

    def _explain(self, record: bytes) -> None:
        """A record has given no data."""
        client = self._client
        assert client
        try:
            kind, data = client.open(record)
        except Refused:
            kind, data = 0, b""
        if kind == Content.HANDSHAKE and data in (UPDATE, UPDATE_REQUESTED):
            client.update()
            self._owes_update |= data == UPDATE_REQUESTED
        elif kind != Content.DATA or data:
            self._why = _STRANGE
        self._client_proven |= kind == Content.DATA

    def _flush(self) -> None:
        sealed = self._from_openssl.read()
        if self._given or not sealed:
            return
        if self._server and not self._why:
            self._count(bytearray(sealed))
        self._outgoing.write(sealed)

    def _count(self, sealed: bytearray) -> None:
        """Count what OpenSSL has sealed; the first record, and one that may be the KeyUpdate that is
        owed, is opened."""
        server = self._server
        assert server
        while record := take(sealed):
            if record[0] != Content.DATA:
                self._why = _STRANGE
                return
            if self._server_proven and not self._owes_update:
                server.count += 1
                continue
            try:
                kind, data = server.open(record)
            except Refused:
                self._why = "its keys are not those that OpenSSL has sealed with"
                return
            self._server_proven = True
            if kind == Content.HANDSHAKE and data[:1] == UPDATE[:1]:
                server.update()
                self._owes_update = False
