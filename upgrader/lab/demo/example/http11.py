# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of HTTP/1.1 that the example service speaks (RFC 9112)."""

import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import upgrader

#: A request longer than this, head and body together, is refused.
LIMIT = 65_536


class RequestError(Exception):
    """A request that makes no sense, or is too long."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `length` is that of its body in bytes."""

    method: str
    path: str
    close: bool
    length: int

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Read a head, with or without its body; raises RequestError."""
        head, _, _ = message.partition(b"\r\n\r\n")
        start, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise RequestError(HTTPStatus.BAD_REQUEST)
            headers[name.lower()] = value.strip()
        words = start.split(" ")
        length = headers.get("content-length", "0")
        if len(words) != 3 or words[2] != "HTTP/1.1" or not words[1].startswith("/"):
            raise RequestError(HTTPStatus.BAD_REQUEST)
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in headers:
            raise RequestError(HTTPStatus.BAD_REQUEST)
        if len(length) > 9 or len(message) + int(length) > LIMIT:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        close = headers.get("connection", "").lower() == "close"
        return cls(words[0], words[1], close, int(length))


def frame(buffer: bytearray) -> int | None:
    """Return the length of the first request in the buffer, or None while it is incomplete.

    A head that makes no sense counts as a whole message; `Request.parse` refuses it.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    try:
        length = end + 4 + Request.parse(bytes(buffer[: end + 4])).length
    except RequestError:
        return end + 4
    return length if length <= len(buffer) else None


async def requests(peer: upgrader.Peer[Any]) -> AsyncIterator[Request]:
    """Yield the requests of a connection; answer one that makes no sense with an error, and end there."""
    try:
        async for message in peer.messages(frame, limit=LIMIT):
            yield Request.parse(message)
    except RequestError as error:
        await peer.write(refusal(error.status))
    except upgrader.MessageTooLong:
        await peer.write(refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE))


def head(status: HTTPStatus, headers: dict[str, object]) -> bytes:
    """Make the head of a response."""
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def response(status: HTTPStatus, headers: dict[str, object], text: str) -> bytes:
    """Make a whole response, with a checksum over its body."""
    body = text.encode()
    sizes = {"Content-Length": len(body), "Body-Crc32": f"{zlib.crc32(body):08x}"}
    return head(status, {**headers, **sizes, "Content-Type": "text/plain"}) + body


def refusal(status: HTTPStatus) -> bytes:
    """Make the response to a request that makes no sense; the connection is to be closed after it."""
    return response(status, {"Connection": "close"}, f"{status.phrase}\n")


def chunk(data: bytes) -> bytes:
    """Make one chunk of a chunked response."""
    return b"%x\r\n%s\r\n" % (len(data), data)
