# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client over TLS says, and what comes with its connection from another process."""

import contextlib
import os
import ssl
from collections.abc import Callable

import msgspec

from tests.fuzz.fuzz import Decoder
from tests.fuzz.mutations import change_bytes, change_msgpack
from tests.unit.tls_pairs import client_context, server_context
from upgrader.errors import ImageError
from upgrader.protocol import secret_memory
from upgrader.protocol.fd import Fd
from upgrader.protocol.tls_state import TlsSecrets, TlsState
from upgrader.tls.keys import SUITES, Direction
from upgrader.tls.listener import TlsListener
from upgrader.tls.moved import Moved
from upgrader.tls.wire import HEADER, UPDATE, UPDATE_REQUESTED, ClientHello, Content

_SUITE = "TLS_AES_128_GCM_SHA256"
_SECRETS = TlsSecrets(bytes(32), bytes(range(32)))
_STATE = TlsState(_SUITE, 3, 5, b"\x17\3\3\0\x20", True, 512, "h2", True, b"0", {"a": ["b"]}, b"c")


def _first_flight() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client_context().wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def _hello(data: bytes) -> None:
    ClientHello.find(data)


def _secrets(data: bytes) -> None:
    fd = Fd(os.memfd_create("fuzzed", os.MFD_CLOEXEC))
    with fd:
        os.write(fd.fileno(), data)
        secret_memory.take(fd)


def _state(data: bytes) -> None:
    """What it loads can be asked, and written to."""
    moved = _attached(msgspec.msgpack.decode(data, type=TlsState))
    moved.getpeercert()
    moved.write(b"x")
    _read(moved)


def _attached(state: TlsState, came: bytes = b"") -> Moved:
    moved = Moved(state, _SECRETS)
    incoming = ssl.MemoryBIO()
    incoming.write(came)
    moved.attach(_CONTEXT, incoming, ssl.MemoryBIO())
    return moved


def _read(moved: Moved) -> None:
    """To the end, or the error; after that, nothing is given any more."""
    try:
        while moved.read(100):
            pass
    except ssl.SSLWantReadError:
        return
    except ssl.SSLError:
        assert moved.why_it_stays
        raise


def _records(data: bytes) -> None:
    _read(_attached(TlsState(_SUITE, 0, 0), data))


def _contents(data: bytes) -> None:
    """Sealed with the right key: a client may put anything into a record."""
    client = Direction(SUITES[_SUITE], _SECRETS.client)
    record = client.seal(data[0] if data else 0, data[1 : 1 << 15])
    _read(_attached(TlsState(_SUITE, 0, 0), record))


def _handshake() -> Callable[[bytes], None]:
    """Whatever comes first, OpenSSL says what is wrong with it."""
    context = server_context()
    TlsListener(context)

    def run(data: bytes) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        made = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            made.do_handshake()

    return run


_CONTEXT = server_context()


def tls_decoders() -> list[Decoder]:
    """All of them."""
    flight = _first_flight()
    secret_memory.kind()
    content = msgspec.msgpack.encode({3: _SECRETS, 5: _SECRETS})
    framed = len(content).to_bytes(8, "big") + content
    client = Direction(SUITES[_SUITE], _SECRETS.client)
    sealed = b"".join(client.seal(kind, data) for kind, data in ((23, b"GET /"), (22, UPDATE)))
    contents = [
        bytes((kind,)) + data
        for kind, data in (
            (Content.DATA, b"GET /"), (Content.HANDSHAKE, UPDATE),
            (Content.HANDSHAKE, UPDATE_REQUESTED), (Content.ALERT, b"\1\0"),
        )
    ]  # fmt: skip
    return [
        Decoder("ClientHello", _hello, (ValueError,), [flight[HEADER:]], change_bytes),
        Decoder("first records over TLS", _handshake(), (ssl.SSLError,), [flight], change_bytes),
        Decoder("secrets", _secrets, (ImageError,), [framed], change_bytes),
        Decoder("state of a TLS connection", _state, (ValueError, RecursionError, msgspec.MsgspecError, ssl.SSLError),
                [msgspec.msgpack.encode(_STATE)], change_msgpack),
        Decoder("TLS records after a move", _records, (ssl.SSLError,), [sealed], change_bytes),
        Decoder("in TLS records after a move", _contents, (ssl.SSLError,), contents, change_bytes),
    ]  # fmt: skip
