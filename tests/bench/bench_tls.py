# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a message over TLS costs: in OpenSSL, in OpenSSL while connections may move, and after a move."""

import os
import ssl
import statistics
import time
from collections.abc import Callable

from tests.unit.tls_pairs import Pair, client_context, server_context
from upgrader.tls.wire import Content

ROUNDS = 9
MESSAGES = 300  # of each size in a round


class Plain:
    """A connection as without the option."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server_context().wrap_bio(self.incoming, self.outgoing, server_side=True)
        to_client, from_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context().wrap_bio(to_client, from_client)
        done = [False, False]
        while not all(done):
            for number, each in enumerate((self.client, self.server)):
                try:
                    each.do_handshake()
                    done[number] = True
                except ssl.SSLWantReadError:
                    pass
                self.incoming.write(from_client.read())
                to_client.write(self.outgoing.read())
        self._from_client = from_client

    def records(self, data: bytes) -> list[bytes]:
        """What a client sends."""
        made = []
        for _ in range(MESSAGES):
            self.client.write(data)
            made.append(self._from_client.read())
        return made


class Tapped(Pair):
    def records(self, data: bytes) -> list[bytes]:
        return [self.sealing.seal(Content.DATA, data) for _ in range(MESSAGES)]


def moved() -> Tapped:
    pair = Tapped()
    pair.move()
    return pair


def microseconds(side: Plain | Tapped, data: bytes) -> float:
    """For one message read and one of the same size written."""
    records = side.records(data)
    read, write = side.server.read, side.server.write
    begin = time.perf_counter()
    for record in records:
        side.incoming.write(record)
        read(65536)
        write(data)
        side.outgoing.read()
    return (time.perf_counter() - begin) / MESSAGES * 1e6


def test_messages() -> None:
    """The three beside each other, round by round."""
    kinds: dict[str, Callable[[], Plain | Tapped]] = {
        "OpenSSL": Plain,
        "UPGRADER_TLS=move": Tapped,
        "after a move": moved,
    }
    sides = {name: make() for name, make in kinds.items()}
    print()
    for size in (100, 1000, 16384):
        data = os.urandom(size)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                times[name].append(microseconds(side, data))
        base = statistics.median(times["OpenSSL"])
        for name, found in times.items():
            middle = statistics.median(found)
            print(f"{size:6} B, {name:18} {middle:6.1f} us, {middle / base:.2f} of OpenSSL's time")
