# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a library that owns its sockets has to say for its connections to move."""

import asyncio
from collections.abc import Collection
from typing import Any, ClassVar, Protocol


class Replay(Protocol):
    """A connection without an end whose handler is begun anew, before its client is let in."""

    #: What its library gets from its transport.
    protocol: Any
    #: Whether the handler goes on where it was; decided once it waits for its client, or has failed.
    decided: asyncio.Future[bool] | None
    #: Whether it has failed; also after it was decided.
    refused: bool

    def begin(self, transport: asyncio.Transport) -> None:
        """Begin it; nothing may be read from the transport yet."""

    def refuse(self) -> None:
        """Its time is up, or its client is gone."""

    def let_in(self) -> None:
        """All handlers have begun: from here on the library has what its client sends."""


class Adapter:
    """Functions that let the connections of a library move, and such that end those which cannot;
    subclass it for `instance.protocols`.

    A connection moves when `idle` says so, and nothing that the library has written is unsent:
    then all of it is its FD, what `save` returns, and bytes that have come and were not given to
    the library. Of two versions of a program the adapters must agree in what they `speak`.
    """

    #: What its connections speak, and how `save` puts it: an idle one goes on under any adapter
    #: of the same name.
    speaks: ClassVar[str]
    #: The version of what `save` returns, as in `@upgrader.state`.
    version: int = 1
    #: The oldest version of the adapter that can read it, as in `@upgrader.state`.
    readable_from: ClassVar[int] = 1
    #: Whether an answer can say that its connection ends (`finish`), so that a client that has to
    #: dial again loses nothing. Then a live migration hardly waits for requests in flight, and an
    #: idle connection that cannot move is not closed before it has had such an answer.
    announces_end: ClassVar[bool] = False

    #: Whether `close` tells the client of a connection without an end (`lasting`) to dial again, as
    #: the close frame of a WebSocket does. A source that has been replaced closes such connections
    #: after `websocket-timeout`, and others only after `live-drain-timeout`.
    says_goodbye: ClassVar[bool] = False

    # Moving: `factory` and `idle` are yours to write.

    def factory(self) -> asyncio.BaseProtocol:
        """A protocol for a new connection: what `loop.create_server` would be given."""
        raise NotImplementedError

    def idle(self, protocol: Any) -> bool:
        """Whether a connection could go on under a new protocol: nothing of a message has been
        taken, and nothing is to be answered. Called often: it must be quick, and change nothing."""
        raise NotImplementedError

    def save(self, protocol: Any) -> bytes | None:
        """What an idle connection needs to go on; None holds it back after all."""
        return b""

    def load(self, saved: bytes) -> asyncio.BaseProtocol:
        """A protocol for a connection that has moved; what it raises refuses the upgrade."""
        return self.factory()

    def answering(self, protocol: Any) -> bool:
        """Whether the application has a request in hand, so that it may write to a state. Half a
        request is none: nobody has acknowledged it."""
        return not self.idle(protocol)

    def background(self) -> Collection[asyncio.Task[Any]]:
        """Tasks of the application that outlive their answers. A restart waits for those that there are,
        while all are served."""
        return ()

    # Moving without an end: the handler is begun anew there, and its client does not notice.

    #: From this `version` on, `replay` is there. A source moves such connections to no older one.
    REPLAYS: ClassVar[int] = 2

    #: What a client is sent whose connection does not go on, so that it dials again: for a WebSocket,
    #: a close frame with 1012 (service restart).
    goodbye: ClassVar[bytes] = b"\x88\x02\x03\xf4"

    def replayable(self, protocol: Any) -> bool:
        """Whether a connection without an end (`lasting`) moves once it is `idle`: the handler waits
        for its client."""
        return False

    def secret(self, protocol: Any) -> bytes:
        """What `replay` needs. It moves in memory of its own: no image, log or dump has it."""
        return b""

    def unfinished(self, protocol: Any) -> bytes:
        """What its client has sent of something that the handler has not got."""
        return b""

    def let_go(self, protocol: Any) -> None:
        """It has moved: nothing of its handler may run here any more, no `finally` either."""

    def replay(self, secret: bytes) -> Replay:
        """Make a connection of what `secret` has returned; what it raises refuses that connection."""
        raise NotImplementedError

    @property
    def last_said(self) -> float:
        """When the handler of such a connection has sent or received something, as of
        `time.monotonic`."""
        return 0.0

    def in_hand(self) -> tuple[int, int]:
        """How many messages handlers wanted to send after their connections had moved, and for how many
        of these; nobody gets them."""
        return 0, 0

    # Being held: a library that closes idle connections after a while has to say more.

    def stop_clock(self, protocol: Any) -> None:
        """No time-out of the library may close this connection until `start_clock`: it is held, so
        what its client sends does not reach the library. It may still be answering a request."""

    def start_clock(self, protocol: Any) -> None:
        """Time-outs begin anew: the connection was held, or has moved here."""

    # Ending: what is held back goes on in the source.

    def lasting(self, protocol: Any) -> bool:
        """Whether a connection will not be idle again (a WebSocket): nobody waits for it then."""
        return False

    def finish(self, protocol: Any) -> None:
        """The next answer is the last one on this connection, and may say so. Called again and
        again until the connection has ended."""

    def close(self, protocol: Any) -> None:
        """Time is up: say goodbye, where the protocol has a way to."""

    def describe(self, protocol: Any) -> str:
        """What a connection that is held back is at, for people: `GET /slow`."""
        return self.speaks
