# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kinds of client, as asyncio protocols. Each reports what it saw to the ledger, which judges it.

A request is sent when it is due, even if the one before is not answered yet (HTTP/1.1 allows that). If the service stands
still, requests wait, and each wait counts from when the request was due: no coordinated omission.
"""

import asyncio
from collections import deque
from typing import cast

from upgrader.lab.demo.ledger import ContradictionError, Exchange, Ledger, RequestKind, Track
from upgrader.lab.demo.responses import BadResponseError, Chunk, Response, ResponseReader


class Client(asyncio.Protocol):
    """One TCP connection with its requests in the order in which they were sent."""

    kind: RequestKind
    #: Whether the connection is still used after a wrong answer.
    trusting = True

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.outstanding: deque[Exchange] = deque()
        self.track = Track()
        self.lost = False
        self._reader = ResponseReader()

    async def connect(self, host: str, port: int) -> None:
        """Open the connection; a failure is a loss for the ledger, and is not raised."""
        try:
            await self.loop.create_connection(lambda: self, host, port)
        except OSError as error:
            self.lose(f"could not connect: {error.strerror or error}")

    def ask(self, path: str, due: float) -> None:
        """Send a request for `path`, which is due now: at once, or as soon as there is a connection."""
        self.outstanding.append(Exchange(self.kind, due, path))
        self.ledger.asked[self.kind] += 1
        if self.transport is not None:
            self._send(path)

    def overdue(self, before: float) -> None:
        """Give up if the oldest request was due before that time."""
        if self.outstanding and self.outstanding[0].due < before:
            self.lose(f"no answer to {self.outstanding[0].path}")

    def leave(self) -> None:
        """Close the connection for good; what happens to it from now on is not a loss."""
        self.lost = True
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: send what is waiting."""
        self.transport = cast(asyncio.Transport, transport)
        if self.lost:
            self.transport.abort()
        for exchange in self.outstanding:
            self._send(exchange.path)

    def data_received(self, data: bytes) -> None:
        """asyncio: read responses."""
        now = self.loop.time()
        try:
            for event in self._reader.feed(data):
                if self.lost:
                    return
                if isinstance(event, Chunk):
                    self.chunk(event.data)
                else:
                    self.answered(event, now)
        except BadResponseError as error:
            self.lose(str(error))

    def eof_received(self) -> None:
        """asyncio: the service will send nothing more."""
        try:
            self._reader.feed_eof()
        except BadResponseError as error:
            self.lose(str(error))
        else:
            self.ended("the service closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is gone."""
        if not self.lost:
            self.ended(str(exc) if exc else "the service closed the connection")

    def ended(self, reason: str) -> None:
        """Count the end of the connection between two responses as a loss; clients that asked for it override this."""
        self.lose(reason)

    def answered(self, response: Response, now: float) -> None:
        """A whole response arrived."""
        if not self.outstanding:
            self.lose(f"a response to nothing (status {response.status})")
            return
        exchange = self.outstanding.popleft()
        try:
            self.ledger.answer(exchange, self.track, response, now)
        except ContradictionError as error:
            if self.trusting:
                self.ledger.fail(self.kind, exchange.due, now, str(error), counted=error.counted)
            else:
                self.lose(str(error))

    def chunk(self, data: bytes) -> None:
        """A chunk of a response that goes on."""
        self.lose(f"a chunk of {len(data)} bytes in what is no stream")

    def lose(self, reason: str) -> None:
        """Give the connection up: count the requests that are outstanding as failed, or the connection itself."""
        if self.lost:
            return
        now = self.loop.time()
        for exchange in self.outstanding or [Exchange(self.kind, now, "")]:
            self.ledger.fail(self.kind, exchange.due, now, reason)
        self.outstanding.clear()
        self.leave()

    def _send(self, path: str) -> None:
        assert self.transport is not None
        self.transport.write(_request(path))


class NewClient(Client):
    """A connection for one request, which asks the service to close it."""

    kind = RequestKind.NEW

    def ended(self, reason: str) -> None:
        """Expect the end once the answer is there."""
        if self.outstanding:
            self.lose(reason)
        else:
            self.leave()

    def _send(self, path: str) -> None:
        assert self.transport is not None
        self.transport.write(_request(path, "Connection: close\r\n"))


class KeepaliveClient(Client):
    """A connection for many requests, which must stay open throughout."""

    kind = RequestKind.KEEPALIVE


class SplitClient(Client):
    """A connection whose requests are cut in two by the upgrade: half is sent before, half after."""

    kind = RequestKind.SPLIT

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._rest = b""

    def begin(self, path: str) -> None:
        """Send the first half of a request, which ends in the middle of its head."""
        if self.transport is not None and not self._rest:
            request = _request(path)
            half = len(request) // 2
            self.transport.write(request[:half])
            self._rest, self._path = request[half:], path

    def finish(self) -> None:
        """Send the second half; the request is due now."""
        if self._rest and not self.lost:
            self.ask(self._path, self.loop.time())

    def _send(self, path: str) -> None:
        assert self.transport is not None
        self.transport.write(self._rest)
        self._rest = b""


class HeldClient(Client):
    """An idle connection with a request now and then; it is lost at most once."""

    kind = RequestKind.HELD
    trusting = False

    def lose(self, reason: str) -> None:
        """Count one lost connection, however many requests are outstanding."""
        if self.lost:
            return
        self.ledger.fail(self.kind, self.loop.time(), self.loop.time(), reason)
        self.outstanding.clear()
        self.leave()


class StreamClient(HeldClient):
    """One response that never ends; the gaps between its chunks are counted, and it breaks at most once."""

    kind = RequestKind.STREAM

    def answered(self, response: Response, now: float) -> None:
        """The head of the stream."""
        super().answered(response, now)
        self.track.chunk_at = now

    def overdue(self, before: float) -> None:
        """Give up if the stream has been silent since that time."""
        super().overdue(before)
        if not self.lost and self.track.chunk_at and self.track.chunk_at < before:
            self.lose(f"silent after chunk {self.track.sequence}")

    def chunk(self, data: bytes) -> None:
        """The next chunk."""
        if not data:
            self.lose("the stream came to its end")
            return
        try:
            self.ledger.chunk(self.track, data, self.loop.time())
        except ContradictionError as error:
            self.lose(str(error))


def _request(path: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: demo\r\n{more}\r\n".encode()
