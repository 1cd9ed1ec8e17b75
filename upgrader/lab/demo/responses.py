# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read HTTP/1.1 responses from bytes, for the load client; checks the framing only (RFC 9112)."""

from collections.abc import Iterator
from dataclasses import dataclass

#: A response head longer than this is refused; the example's is about 200 bytes.
HEAD_LIMIT = 16_384


class BadResponseError(Exception):
    """The bytes of the service are not the HTTP/1.1 that was asked for."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response: header names in lower case; `chunked` means that the body follows as `Chunk`s."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunked: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a chunked body; an empty one is its end."""

    data: bytes


class ResponseReader:
    """Takes bytes in any portions by `feed`, and returns whole responses and chunks."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._in_chunks = False

    def feed(self, data: bytes) -> Iterator[Response | Chunk]:
        """Yield what became complete with `data`; raises `BadResponseError`."""
        self._buffer += data
        while (event := self._chunk() if self._in_chunks else self._response()) is not None:
            yield event

    def feed_eof(self) -> None:
        """Take the end of the connection; raises `BadResponseError` if it cuts a response short."""
        if self._in_chunks:
            raise BadResponseError("the stream ended without its last chunk")
        if self._buffer:
            raise BadResponseError(f"closed {len(self._buffer)} bytes into a response")

    def _response(self) -> Response | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise BadResponseError(f"no end of the head within {HEAD_LIMIT} bytes")
            return None
        status, headers = _head(bytes(self._buffer[:end]))
        chunked = headers.get("transfer-encoding") == "chunked"
        length = 0 if chunked else _number(headers.get("content-length", ""), 10)
        start = end + 4
        if len(self._buffer) < start + length:
            return None
        body = bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        self._in_chunks = chunked
        return Response(status, headers, body, chunked)

    def _chunk(self) -> Chunk | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > 16:
                raise BadResponseError(f"no chunk size in {bytes(self._buffer[:16])!r}")
            return None
        size = _number(self._buffer[:end].decode("latin-1"), 16)
        start = end + 2
        if len(self._buffer) < start + size + 2:
            return None
        data = bytes(self._buffer[start : start + size])
        if self._buffer[start + size : start + size + 2] != b"\r\n":
            raise BadResponseError(f"a chunk of {size} bytes does not end where it says")
        del self._buffer[: start + size + 2]
        self._in_chunks = size > 0
        return Chunk(data)


def _head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    protocol, _, rest = first.partition(" ")
    if protocol != "HTTP/1.1":
        raise BadResponseError(f"not a response: {first[:60]!r}")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadResponseError(f"not a header: {line[:60]!r}")
        headers[name.lower()] = value.strip()
    return _number(rest[:3], 10), headers


def _number(text: str, base: int) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if number < 0:
        raise BadResponseError(f"not a length or status: {text[:20]!r}")
    return number
