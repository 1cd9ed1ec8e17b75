# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TLS connection in memory: a real client's handshake, then a client that can do all that one must
not, because it seals its records itself."""

import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upgrader.tls.keys import SUITES, Direction
from upgrader.tls.listener import TlsListener
from upgrader.tls.moved import Moved
from upgrader.tls.tapped import Tapped
from upgrader.tls.wire import Content, take

CERTIFICATE = Path(__file__).with_name("tls.pem")


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Pair:
    """A server whose connection can move, and its client. What is on the wire is kept."""

    def __init__(
        self,
        prepare: Callable[[ssl.SSLContext, ssl.SSLContext], object] = lambda server, client: None,
        meanwhile: Callable[[ssl.SSLContext, bytes], object] = lambda server, flight: None,
    ) -> None:
        """`prepare` changes the contexts of server and client; `meanwhile` gets each flight of the
        client, once the server has read it."""
        self._meanwhile = meanwhile
        self.context, theirs = server_context(), client_context()
        prepare(self.context, theirs)
        self.listener = TlsListener(self.context)
        with tempfile.NamedTemporaryFile() as log:
            theirs.keylog_filename = log.name
            self._handshake(theirs)
            lines = [line.split() for line in log.read().decode().splitlines()]
        if self.client.version() != "TLSv1.3":
            return
        cipher = self.client.cipher()
        assert cipher
        secrets = {line[0]: bytes.fromhex(line[2]) for line in lines if len(line) == 3}
        used = SUITES[cipher[0]]
        #: What the client seals and opens by itself.
        self.sealing = Direction(used, secrets["CLIENT_TRAFFIC_SECRET_0"])
        self.opening = Direction(used, secrets["SERVER_TRAFFIC_SECRET_0"])
        self.received: list[tuple[int, bytes]] = []  #: what records to the client had in them
        self.raw = self.tickets  #: all that the server has sealed

    def _handshake(self, theirs: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        to_client, from_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        made: Any = self.context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        assert isinstance(made, Tapped)
        self.server: Any = made
        self.client = theirs.wrap_bio(to_client, from_client)
        self.tickets = b""
        done = [False, False]
        flights: list[bytes] = []
        while not all(done):
            for number, each in enumerate((self.client, self.server)):
                if not done[number]:
                    try:
                        each.do_handshake()
                        done[number] = True
                    except ssl.SSLWantReadError:
                        pass
                    flight = from_client.read()
                    self.incoming.write(flight)
                    if number and flights:
                        self._meanwhile(self.context, flights.pop())
                    if flight:
                        flights.append(flight)
                    sent = self.outgoing.read()
                    if done[0]:
                        self.tickets += sent
                    to_client.write(sent)

    def send(self, data: bytes, kind: int = Content.DATA) -> bytes:
        """Let a client's record come to the server; returns it."""
        record = self.sealing.seal(kind, data)
        self.incoming.write(record)
        return record

    def read(self) -> bytes:
        """What the server reads now: nothing where it would wait."""
        data = b""
        try:
            while True:
                data += self.server.read(65536)
        except ssl.SSLWantReadError:
            return data

    def arrive(self) -> list[tuple[int, bytes]]:
        """Open what the server has sealed since: the client follows a KeyUpdate."""
        self.raw += self.outgoing.read()
        records = bytearray(self.raw)
        self.raw = b""
        came = []
        while record := take(records):
            kind, data = self.opening.open(record)
            came.append((kind, data))
            if kind == Content.HANDSHAKE and data[0] == 24:
                self.opening.update()
        assert not records
        return came

    def data(self) -> bytes:
        """What of that is data."""
        return b"".join(data for kind, data in self.arrive() if kind == Content.DATA)

    def move(self) -> None:
        """Go on with the other record layer, as after a commit; what lies in `incoming` is not lost."""
        assert "" == self.server.why_it_stays
        state, secrets = self.server.snapshot()
        self.server.give_up()
        moved = Moved(state, secrets)
        incoming = ssl.MemoryBIO()
        incoming.write(self.incoming.read())
        self.incoming = incoming
        self.alerts: list[bytes] = []
        moved.send_alert = self.alerts.append
        moved.attach(self.context, self.incoming, self.outgoing)
        moved.do_handshake()
        self.server = moved

    def alert(self) -> int:
        """The only alert that was sent, and nothing else was."""
        (record,) = self.alerts
        assert b"" == self.outgoing.read()
        kind, data = self.opening.open(record)
        assert Content.ALERT == kind
        assert 2 == data[0]
        return data[1]
