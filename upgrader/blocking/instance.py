# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author sees of an instance without asyncio: `for backend in instance.serve(inbox):`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, overload

from upgrader.backends.kind import BackendKind
from upgrader.blocking.handled_connection import BlockingConnection
from upgrader.blocking.runtime import BlockingRuntime
from upgrader.errors import DeclarationError
from upgrader.instance.base import BaseInstance
from upgrader.instance.handles import DeclaredSocket
from upgrader.instance.inbox import Frame
from upgrader.instance.parts import InstanceParts
from upgrader.instance.peers import Peers

S = TypeVar("S")
Readable = TypeVar("Readable", bound=DeclaredSocket | BackendKind)

__all__ = ["Instance", "Peer"]


class BlockingPeer(Generic[S]):
    """One connection, accepted or adopted. Its handler is called once at first, and again whenever
    more has come; every return is a safe point."""

    def __init__(self, connection: BlockingConnection) -> None:
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

    def messages(self, frame: Frame, limit: int = 65536) -> Iterator[bytes]:
        """Take the whole messages that are here; an incomplete one stays unread until more comes.

        `frame` is a separator, or a function that gets the buffer and returns the length of the
        first whole message, or None. Raises MessageTooLong above `limit` bytes. In the first call
        of the handler of an adopted connection there is none; it is called again if there are.
        """
        while (message := self._connection.message(frame, limit)) is not None:
            yield message

    def lines(self, limit: int = 65536) -> Iterator[bytes]:
        """Take the whole lines that are here, without their end. Raises MessageTooLong above
        `limit` bytes."""
        for line in self.messages(b"\n", limit):
            yield line.rstrip(b"\r\n")

    def write(self, data: bytes) -> None:
        """Queue data and return; the handler is not called again while over 64 KiB are unsent.

        Raises ConnectionResetError when the peer is gone, Retired after a migration.
        """
        self._connection.queue(data)

    def close(self) -> None:
        """Close the connection once this call of the handler is over and all is sent."""
        self._connection.close()


#: Its name in `upgrader.blocking`.
Peer = BlockingPeer


class Instance(BaseInstance):
    """An instance whose loop is the `for` loop of the program."""

    _WAITS = False

    def __init__(self, service: str, version: str, environment: MutableMapping[str, str]) -> None:
        super().__init__(InstanceParts(service, version, environment))
        self._runtime: BlockingRuntime | None = None  # while it serves

    @property
    def peers(self) -> Peers[BlockingPeer[Any]]:
        """All open connections that handlers of `connections` serve."""
        return Peers(self._runtime.connections.served if self._runtime else [])

    @overload
    def serve(self) -> Iterator[DeclaredSocket]: ...

    @overload
    def serve(self, *backends: Readable) -> Iterator[Readable]: ...

    def serve(self, *backends: Readable) -> Iterator[Any]:
        """Load, verify, tell PID 1 READY=1; then yield each of `backends` that has something to
        read, until this instance is stopped.

        Raises UpgradeError if the instance cannot be loaded (the image stays as it was), and
        DeclarationError outside of the main thread, where no signal arrives.
        """
        if threading.current_thread() is not threading.main_thread():
            raise DeclarationError("serve()", "runs in the main thread only")
        if self._runtime:
            raise DeclarationError("serve()", "is called twice")
        by_socket = {each._bound: each for each in backends if isinstance(each, DeclaredSocket)}
        others = [each for each in backends if isinstance(each, BackendKind)]
        with BlockingRuntime(self._parts, by_socket, others, BlockingPeer) as self._runtime:
            yield from self._runtime.serve()

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._parts.end(error)
