# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TLS connection goes on in another process, and whoever attacks it gets nothing."""

import os
import ssl
from typing import Any

import pytest

from tests.unit.tls_pairs import CERTIFICATE, Pair
from upgrader.errors import DeclarationError
from upgrader.protocol.tls_state import TlsSecrets
from upgrader.tls import moved as moved_module
from upgrader.tls.key_log import traffic_secrets
from upgrader.tls.keys import SUITES, Direction, Refused
from upgrader.tls.listener import TlsListener
from upgrader.tls.moved import Moved
from upgrader.tls.wire import UPDATE, UPDATE_REQUESTED, Alert, ClientHello, Content, take

LARGE = 70_007


def hexadecimal(text: str) -> bytes:
    return bytes.fromhex("".join(text.split()))


# RFC 8448, section 3: "Simple 1-RTT Handshake"

CLIENT_SECRET = hexadecimal(
    "9e 40 64 6c e7 9a 7f 9d c0 5a f8 88 9b ce 65 52 87 5a fa 0b 06 df 00 87 f7 92 eb b7 c1 75 04 a5"
)
SERVER_SECRET = hexadecimal(
    "a1 1a f9 f0 55 31 f8 56 ad 47 11 6b 45 a9 50 32 82 04 b4 f4 4b fb 6b 3a 4b 4f 1f 3f cb 63 16 43"
)
DATA = bytes(range(50))
FROM_CLIENT = hexadecimal(
    """17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab
    3f 2b 98 19 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea
    e6 3a ee bb 21 69 49 15 e4"""
)
FROM_SERVER = hexadecimal(
    """17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b
    36 e3 0e fa f9 7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32
    54 0d d0 32 e1 67 c2 95 5d"""
)


def test_vectors_of_rfc_8448() -> None:
    """Sealed and opened as the RFC has it: the first of the client, the second of the server, after
    its ticket, and both say goodbye."""
    suite = SUITES["TLS_AES_128_GCM_SHA256"]
    client, server = Direction(suite, CLIENT_SECRET), Direction(suite, SERVER_SECRET, 1)

    assert FROM_CLIENT == client.seal(Content.DATA, DATA)
    assert FROM_SERVER == server.seal(Content.DATA, DATA)
    assert (Content.DATA, DATA) == Direction(suite, CLIENT_SECRET).open(FROM_CLIENT)
    assert (Content.DATA, DATA) == Direction(suite, SERVER_SECRET, 1).open(FROM_SERVER)
    goodbyes = [
        "17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3",
        "17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9",
    ]
    assert goodbyes == [each.seal(Content.ALERT, b"\1\0").hex(" ") for each in (client, server)]


# A connection moves


@pytest.mark.parametrize("name", SUITES)
def test_a_connection_goes_on(name: str) -> None:
    """In all three suites, more than once, both ways, with what had come and was not read."""
    pair = Pair(lambda server, client: None)
    if pair.client.cipher()[0] != name:  # type: ignore[index]
        pair = _of_suite(name)
    for size in (1, 1000, LARGE):
        data = os.urandom(size)
        for start in range(0, size, 16384):
            pair.send(data[start : start + 16384])
        assert data == pair.read()
        pair.server.write(data)
        assert data == pair.data()
        record = pair.send(b"across")
        rest = pair.incoming.read()
        assert rest == record
        pair.incoming.write(rest[:7])  # half a record
        assert b"" == pair.read()
        pair.move()
        pair.incoming.write(rest[7:])
        assert b"across" == pair.read()


def _of_suite(name: str) -> Pair:
    """Where a context cannot choose among the suites of TLS 1.3, a client of openssl does that in
    the process tests; here, both directions go on by hand."""
    pair = Pair()
    state, _ = pair.server.snapshot()
    suite = SUITES[name]
    client, server = os.urandom(suite.secret), os.urandom(suite.secret)
    pair.sealing, pair.opening = Direction(suite, client), Direction(suite, server)
    pair.raw = b""
    changed = type(state)(name, 0, 0)
    pair.server = Moved(changed, TlsSecrets(client, server))
    pair.server.attach(pair.context, pair.incoming, pair.outgoing)
    return pair


def test_what_programs_ask_is_answered_as_before() -> None:
    """Or raises: nothing is made up."""

    def prepare(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(CERTIFICATE)
        server.set_alpn_protocols(["http/1.1"])
        client.load_cert_chain(CERTIFICATE)
        client.set_alpn_protocols(["h2", "http/1.1"])

    pair = Pair(prepare)

    def answers() -> list[Any]:
        s = pair.server
        return [
            s.getpeercert(), s.getpeercert(True), s.cipher(), s.version(), s.compression(),
            s.selected_alpn_protocol(), s.session_reused, s.get_channel_binding(), s.server_side,
            s.server_hostname, s.context,
        ]  # fmt: skip

    before = answers()
    assert before[0]
    assert before[7]
    for _ in range(2):
        pair.move()
        assert before == answers()
    with pytest.raises(NotImplementedError):
        pair.server.shared_ciphers()
    with pytest.raises(NotImplementedError):
        pair.server.verify_client_post_handshake()
    with pytest.raises(NotImplementedError):
        assert pair.server.session
    with pytest.raises(ValueError, match="channel binding"):
        pair.server.get_channel_binding("tls-exporter")


# Whose secrets

RANDOM = bytes(range(32))
LINES = [
    ("CLIENT_TRAFFIC_SECRET_0", RANDOM.hex(), "aa"),
    ("SERVER_TRAFFIC_SECRET_0", RANDOM.hex(), "bb"),
]


def test_secrets_of_one_handshake() -> None:
    """Each once, and all of this client's random."""
    assert (b"\xaa", b"\xbb") == traffic_secrets([*LINES, ("# a", "comment")], RANDOM)
    for wrong in (
        [*LINES, LINES[1]],
        LINES[:1],
        [*LINES, ("EXPORTER_SECRET", "00", "cc")],
        [LINES[0], ("SERVER_TRAFFIC_SECRET_0", RANDOM.hex(), "no")],
    ):
        assert traffic_secrets(wrong, RANDOM) is None


def test_a_copied_random_gets_nothing() -> None:
    """An attacker sends the very ClientHello of a client again, and OpenSSL writes secrets under the
    same random: before the client has finished, and after. The client's connection moves with its own."""
    attacks: list[ssl.SSLObject] = []

    def copy(context: ssl.SSLContext, flight: bytes) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        attacks.append(context.wrap_bio(incoming, outgoing, server_side=True))
        incoming.write(flight)
        with pytest.raises(ssl.SSLError):  # wants more, or is no ClientHello
            attacks[-1].do_handshake()

    def attack(context: ssl.SSLContext, flight: bytes) -> None:
        hellos.append(flight)
        copy(context, flight)
        with open(context.keylog_filename, "a") as log:  # as one that is not tapped would
            log.write(f"SERVER_TRAFFIC_SECRET_0 {hellos[0][11:43].hex()} {'00' * 48}\n")

    hellos: list[bytes] = []
    pair = Pair(meanwhile=attack)
    copy(pair.context, hellos[0])
    attacked = [each for each in attacks if getattr(each, "_hello", None) == pair.server._hello]
    assert 2 <= len(attacked)
    assert any("SERVER_TRAFFIC_SECRET_0" == line[0] for line in attacked[0]._lines)  # type: ignore[attr-defined]

    pair.move()
    pair.server.write(b"mine")
    pair.send(b"yours")

    assert b"mine" == pair.data()
    assert b"yours" == pair.read()
    with open(pair.context.keylog_filename) as log:
        assert "" == log.read()


def test_secrets_that_do_not_open_what_was_sealed() -> None:
    """Then the connection stays: it is tried on the first record that OpenSSL has sealed."""
    pair = Pair(lambda server, client: setattr(server, "num_tickets", 0))
    pair.server._server = Direction(SUITES[pair.server.cipher()[0]], bytes(48))

    pair.server.write(b"x")

    assert "its keys are not those that OpenSSL has sealed with" == pair.server.why_it_stays


@pytest.mark.parametrize("tickets", [0, 2])
def test_with_and_without_tickets(tickets: int) -> None:
    """What is sealed right after the handshake counts. Without any, the keys have not been tried, and the
    connection stays until its first answer."""
    pair = Pair(lambda server, client: setattr(server, "num_tickets", tickets))
    if not tickets:
        assert "its keys have opened no record yet" == pair.server.why_it_stays
        pair.server.write(b"first")
        assert b"first" == pair.data()
    pair.move()
    pair.server.write(b"x")
    assert b"x" == pair.data()


def test_another_group_is_asked_for() -> None:
    """A HelloRetryRequest: two ClientHellos, and one set of secrets."""
    flights: list[bytes] = []
    pair = Pair(
        lambda server, client: server.set_ecdh_curve("secp384r1"),
        meanwhile=lambda context, flight: flights.append(flight),
    )
    assert (
        b"\x14\x03\x03\x00\x01\x01\x16" == flights[1][:7]
    )  # change_cipher_spec, then the second one
    pair.move()
    pair.server.write(b"x")
    assert b"x" == pair.data()
    pair.send(b"y")
    assert b"y" == pair.read()


def test_a_key_log_of_an_admin_is_refused() -> None:
    """Not replaced."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.keylog_filename = "/dev/null"
    with pytest.raises(DeclarationError, match="writes its keys to /dev/null"):
        TlsListener(context)


# KeyUpdate


@pytest.mark.parametrize("message", [UPDATE, UPDATE_REQUESTED])
@pytest.mark.parametrize("moment", ["before", "before, answered", "at", "after"])
def test_key_update(message: bytes, moment: str) -> None:
    """By the client, with an answer or without, before the move, at it, and after it."""
    pair = Pair()
    pair.send(b"one")
    assert b"one" == pair.read()
    pair.server.write(b"1")
    if moment == "after":
        pair.move()
    pair.send(message, Content.HANDSHAKE)
    pair.sealing.update()
    pair.send(b"two")
    if moment != "at":
        assert b"two" == pair.read()
    if moment == "before, answered":
        pair.server.write(b"2")
    if moment != "after":
        pair.move()
    if moment == "at":
        assert b"two" == pair.read()
    pair.server.write(b"3")
    pair.send(b"three")
    assert b"three" == pair.read()

    came = [item for item in pair.arrive() if item[1][:1] != b"\4"]  # but for tickets

    updates = [item for item in came if item[0] == Content.HANDSHAKE]
    assert ([(Content.HANDSHAKE, UPDATE)] if message == UPDATE_REQUESTED else []) == updates
    last = [data for kind, data in came if kind == Content.DATA]
    assert [b"1", b"2", b"3"] == last if moment == "before, answered" else [b"1", b"3"] == last
    pair.move()
    pair.server.write(b"4")
    assert b"4" == pair.data()


def test_keys_wear_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are changed long before AES-GCM's limit, on both sides, and not used beyond it."""
    monkeypatch.setattr(moved_module, "UPDATE_AT", 100)
    monkeypatch.setattr(moved_module, "LAST", 200)
    pair = Pair()
    pair.move()
    for _ in range(150):
        pair.server.write(b"x")
    kinds = [data for kind, data in pair.arrive() if kind == Content.HANDSHAKE]
    assert 1 == kinds.count(UPDATE)
    for _ in range(100):
        pair.send(b"y")
    assert b"y" * 100 == pair.read()
    assert [(Content.HANDSHAKE, UPDATE_REQUESTED)] == pair.arrive()
    pair.sealing.count = 200
    pair.server._client.count = 200
    pair.send(b"y")
    with pytest.raises(ssl.SSLError):
        pair.read()
    assert Alert.UNEXPECTED_MESSAGE == pair.alert()


# What a client asks for


@pytest.mark.parametrize(
    ("extensions", "limit"),
    [
        (b"", 1 << 14),
        (b"\0\x01\0\x01\x01", 512),
        (b"\0\x01\0\x01\x04", 4096),
        (b"\0\x1c\0\x02\x01\x01", 256),
        (b"\0\x2b\0\x03\x02\x03\x04", 1 << 14),
    ],
)
def test_the_length_of_records(extensions: bytes, limit: int) -> None:
    """max_fragment_length and record_size_limit are read from the ClientHello."""
    body = b"\3\3" + RANDOM + b"\0" + b"\0\2\x13\x01" + b"\1\0"
    body += len(extensions).to_bytes(2, "big") + extensions
    hello = b"\1" + len(body).to_bytes(3, "big") + body

    assert ClientHello(RANDOM, limit) == ClientHello.find(hello)
    assert ClientHello.find(hello[:-1]) is None
    for wrong in (b"\2" + hello[1:], hello[:40] + b"\xff" + hello[41:], b"\1\xff\xff\xff"):
        with pytest.raises(ValueError, match="it"):
            ClientHello.find(wrong)


def test_no_record_is_longer() -> None:
    """Than the client wants it."""
    pair = Pair()
    pair.server._hello = ClientHello(pair.server._hello.random, 512)
    pair.move()
    data = os.urandom(5000)
    pair.server.write(data)
    came = pair.arrive()
    assert data == b"".join(item for kind, item in came if kind == Content.DATA)
    assert 512 == max(len(item) for kind, item in came if kind == Content.DATA)


# Attacks on a connection that has moved


def _flip(record: bytes) -> bytes:
    return record[:-1] + bytes((record[-1] ^ 1,))


ATTACKS = {
    "flipped": (lambda p: _flip(p.sealing.seal(23, b"evil")), Alert.BAD_RECORD_MAC),
    "its header flipped": (
        lambda p: p.sealing.seal(23, b"evil")[:1] + b"\7" + p.sealing.seal(23, b"evil")[2:],
        Alert.BAD_RECORD_MAC,
    ),
    "truncated": (lambda p: b"\x17\3\3\0\x11" + bytes(17), Alert.BAD_RECORD_MAC),
    "too short for a tag": (lambda p: b"\x17\3\3\0\x10" + bytes(16), Alert.BAD_RECORD_MAC),
    "padding only": (lambda p: p.sealing.seal(0, bytes(20)), Alert.UNEXPECTED_MESSAGE),
    "too long": (lambda p: b"\x17\3\3\x41\x01", Alert.RECORD_OVERFLOW),
    "too much data": (lambda p: p.sealing.seal(23, bytes((1 << 14) + 1)), Alert.RECORD_OVERFLOW),
    "not sealed": (lambda p: b"\x15\3\3\0\2\1\0", Alert.UNEXPECTED_MESSAGE),
    "change_cipher_spec": (lambda p: b"\x14\3\3\0\1\1", Alert.UNEXPECTED_MESSAGE),
    "a ClientHello": (lambda p: p.sealing.seal(22, b"\1\0\0\0"), Alert.UNEXPECTED_MESSAGE),
    "a ticket": (lambda p: p.sealing.seal(22, b"\4\0\0\0"), Alert.UNEXPECTED_MESSAGE),
    "half a KeyUpdate": (lambda p: p.sealing.seal(22, UPDATE[:3]), Alert.DECODE_ERROR),
    "a KeyUpdate of 2": (lambda p: p.sealing.seal(22, UPDATE[:4] + b"\2"), Alert.ILLEGAL_PARAMETER),
    "a kind of its own": (lambda p: p.sealing.seal(99, b"x"), Alert.UNEXPECTED_MESSAGE),
    "half an alert": (lambda p: p.sealing.seal(21, b"\1"), Alert.DECODE_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    """The right alert, nothing is delivered, and the connection is of no use any more."""
    attack, alert = ATTACKS[name]
    pair = Pair()
    pair.move()
    pair.arrive()

    pair.incoming.write(attack(pair))
    pair.send(b"after")

    with pytest.raises(ssl.SSLError) as caught:
        pair.read()
    assert not isinstance(caught.value, ssl.SSLWantReadError)
    assert alert == pair.alert()
    for _ in range(2):
        with pytest.raises(ssl.SSLError):
            pair.server.read(100)
    with pytest.raises(ssl.SSLError):
        pair.server.write(b"x")
    assert b"" == pair.outgoing.read()
    assert 1 == len(pair.alerts)
    assert "it is being closed" == pair.server.why_it_stays


def test_replayed() -> None:
    """The same record twice."""
    pair = Pair()
    record = pair.send(b"pay")
    assert b"pay" == pair.read()
    pair.move()
    pair.arrive()
    pair.incoming.write(record)
    with pytest.raises(ssl.SSLError):
        pair.read()
    assert Alert.BAD_RECORD_MAC == pair.alert()


@pytest.mark.parametrize("kind", [Content.DATA, Content.HANDSHAKE])
def test_records_without_data(kind: int) -> None:
    """Some are legal; a flood of them ends the connection."""
    pair = Pair()
    pair.move()
    for number in range(33):
        if number == 32:
            assert b"" == pair.read()
            pair.arrive()
        pair.send(UPDATE if kind == Content.HANDSHAKE else b"", kind)
        if kind == Content.HANDSHAKE:
            pair.sealing.update()
    with pytest.raises(ssl.SSLError):
        pair.read()
    assert Alert.UNEXPECTED_MESSAGE == pair.alert()


# The end


def test_the_client_ends_it() -> None:
    """close_notify is the end for reading, and writing may go on."""
    pair = Pair()
    pair.move()
    pair.send(b"last")
    pair.send(b"\1\0", Content.ALERT)
    assert b"last" == pair.server.read(100)
    assert b"" == pair.server.read(100)
    pair.server.write(b"answer")
    pair.server.unwrap()
    assert [b"answer", b"\1\0"] == [item for _, item in pair.arrive()][-2:]


def test_the_server_ends_it() -> None:
    """It says so once, and waits for the client's end; data that comes before is dropped."""
    pair = Pair()
    pair.move()
    for _ in range(2):
        with pytest.raises(ssl.SSLWantReadError):
            pair.server.unwrap()
    with pytest.raises(ssl.SSLError):
        pair.server.write(b"more")
    assert [(Content.ALERT, b"\1\0")] == [item for item in pair.arrive() if item[0] == 21]
    pair.send(b"late")
    pair.send(b"\1\0", Content.ALERT)
    pair.server.unwrap()


# One user of each direction


@pytest.mark.parametrize("times", [1, 2])
def test_what_has_moved_seals_nothing(times: int) -> None:
    """No data, no goodbye, no alert, whatever the loop still does with it."""
    pair = Pair()
    for _ in range(times - 1):
        pair.move()
    old, outgoing = pair.server, ssl.MemoryBIO()
    pair.move()
    old._outgoing = outgoing
    pair.send(UPDATE_REQUESTED, Content.HANDSHAKE)
    old._incoming = pair.incoming
    for attempt in (lambda: old.write(b"x"), lambda: old.read(10)):
        with pytest.raises(ssl.SSLError):
            attempt()
    old.unwrap()
    assert b"" == outgoing.read()


# What stays


def test_what_stays() -> None:
    """TLS 1.2, half a record that was read, an end that has begun."""
    pair = Pair(lambda server, client: setattr(client, "maximum_version", ssl.TLSVersion.TLSv1_2))
    assert "it speaks TLSv1.2" == pair.server.why_it_stays
    pair = Pair()
    pair.send(b"two parts")
    assert b"two" == pair.server.read(3)
    assert "part of a record has not been read" == pair.server.why_it_stays
    assert b" parts" == pair.server.read(100)
    assert "" == pair.server.why_it_stays
    pair.send(b"\1\0", Content.ALERT)
    assert b"" == pair.server.read(10)
    assert "it is being closed" == pair.server.why_it_stays


def test_no_tls_at_all() -> None:
    """OpenSSL answers it as ever."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = Pair().context
    made = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ssl.SSLError, match="HTTP_REQUEST"):
        made.do_handshake()


def test_a_record_that_is_none() -> None:
    """Opening refuses; there is no state of it that a second try could use."""
    suite = SUITES["TLS_AES_128_GCM_SHA256"]
    for secret in (b"", bytes(48)):
        with pytest.raises(ValueError, match="no traffic secret"):
            Direction(suite, secret)
    with pytest.raises(Refused):
        Direction(suite, bytes(32)).open(b"\x17\3\3\0\0")
    assert b"" == take(bytearray(b"\x17\3\3"))
    assert "secret" not in repr(TlsSecrets(b"secret", b"secret"))
