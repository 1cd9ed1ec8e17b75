# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the author of a handler sees of its connection."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar, cast

from upgrader.aio.handled_connection import HandledConnection
from upgrader.instance.inbox import Frame

S = TypeVar("S")


class Peer(Generic[S]):
    """One connection, accepted or adopted. Asking for the next message is its safe point."""

    def __init__(self, connection: HandledConnection) -> None:
        self._connection = connection

    @property
    def state(self) -> S:
        """The state that goes with the connection, of the class that `connections` was given; None
        if it was given none."""
        return cast(S, self._connection.session)

    @state.setter
    def state(self, state: S) -> None:
        self._connection.session = state

    @property
    def adopted(self) -> bool:
        """Whether it came from another instance, so that its handler is called anew."""
        return self._connection.adopted

    @property
    def address(self) -> str:
        """The other end's address, as people write it: `192.0.2.1:4711`, `unix peer`."""
        return self._connection.address

    @property
    def tls(self) -> Any:
        """The ssl.SSLObject of a connection over TLS, for `getpeercert`, `selected_alpn_protocol` and
        `version`; None without TLS."""
        return getattr(self._connection.stream, "ssl_object", None)

    async def messages(self, frame: Frame, limit: int = 65536) -> AsyncIterator[bytes]:
        """Whole messages until the peer closes. An incomplete one stays unread, and moves along.

        `frame` is a separator, or a function that gets the buffer and returns the length of the
        first whole message, or None. Raises MessageTooLong above `limit` bytes.
        """
        while (message := await self._connection.message(frame, limit)) is not None:
            yield message

    async def lines(self, limit: int = 65536) -> AsyncIterator[bytes]:
        """Lines without their end, until the peer closes. Raises MessageTooLong above `limit` bytes."""
        async for line in self.messages(b"\n", limit):
            yield line.rstrip(b"\r\n")

    async def read(self, size: int) -> bytes:
        """Read up to `size` more bytes of the message in hand (not a safe point); b"" at the end."""
        return await self._connection.read(size)

    async def readexactly(self, size: int) -> bytes:
        """Read exactly `size` more bytes of the message in hand (not a safe point).

        Raises asyncio.IncompleteReadError if the peer closes before.
        """
        return await self._connection.read_exactly(size)

    async def write(self, data: bytes) -> None:
        """Queue data at once; wait only while more than 64 KiB are unsent (64 MiB while connections
        are collected for a migration).

        Raises ConnectionResetError when the peer is gone, Retired after a migration.
        """
        await self._connection.write(data)

    def safe(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Make what is waited for inside a safe point, too: `state` must say where it stands.

        Nothing may be taken inside: an item of a queue would be lost with this handler, and a read
        raises DeclarationError.
        """
        return self._connection.safe()

    def close(self) -> None:
        """Close the connection, after what is unsent has gone out."""
        self._connection.close()
