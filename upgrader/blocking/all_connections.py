# SPDX-License-Identifier: LGPL-2.1-or-later
"""All connections of an instance without asyncio: accepted, adopted, handled, frozen and closed."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from upgrader.blocking.handled_connection import BlockingConnection
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.connection import HIGH_WATER, ConnectionStream, accept
from upgrader.instance.declarations import Connections
from upgrader.instance.parts import InstanceParts
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.instance import freeze
    from upgrader.instance.adopted import Adopted
    from upgrader.instance.frozen import Moving
    from upgrader.instance.interfaces import Open
    from upgrader.protocol import image
else:
    freeze = later("upgrader.instance.freeze")
    image = later("upgrader.protocol.image")

_log = logging.getLogger("upgrader")


class ServedConnections:
    """Those of all listeners, with their places in the selector of the loop."""

    def __init__(
        self,
        parts: InstanceParts,
        selector: selectors.BaseSelector,
        make_peer: Callable[[BlockingConnection], Any],
    ) -> None:
        """`make_peer`: what handlers get."""
        self.frozen = False  #: nothing here touches what has moved any more
        self.beginning = True  #: not every handler of an adopted connection has been called yet
        self._parts = parts
        self._declarations = parts.declarations
        self._selector = selector
        self._make_peer = make_peer
        self._served: dict[int, tuple[BlockingConnection, Any]] = {}  # with its peer, by FD
        self._staying: list[BlockingConnection] = []
        self._arguments: dict[str, dict[str, Any]] = {}

    @property
    def served(self) -> list[tuple[BlockingConnection, Any]]:
        """All open connections, and how their handlers see them."""
        return list(self._served.values())

    @property
    def streams(self) -> list[ConnectionStream]:
        """Those of all open connections."""
        return [connection.stream for connection, _ in self._served.values()]

    @property
    def staying(self) -> list[ConnectionStream]:
        """Those of the connections that did not move at the last freeze."""
        return [connection.stream for connection in self._staying]

    def all_open(self) -> Sequence[tuple[str, Open]]:
        """Those that are open, each with its listener."""
        return [(each.listener, each.stream) for each, _ in self.served]

    def has_unsent(self) -> bool:
        """Whether something is to be sent on a connection that does not move."""
        return any(
            each.stream.unsent and not self._parts.answering.crosses(each.listener)
            for each, _ in self._served.values()
        )

    def begin(self, loaded: LoadedInstance) -> None:
        """Serve what was adopted and who waits, and accept whoever comes."""
        self._arguments = {
            name: self._declarations.values(connections.handler, skip=1)
            for name, connections in self._declarations.connections.items()
        }
        for adopted in loaded.each_adopted():
            self._adopt(adopted)
        self.beginning = False
        for connection, _ in self.served:
            if connection.stream.inbox.buffer:
                self._handle(connection)
        for connections in self._declarations.connections.values():
            listener = connections.listener
            while listener.backlog:
                self._open(connections, listener.backlog.popleft())
            for sock in listener.sockets:
                self._selector.register(sock, selectors.EVENT_READ, connections)

    def _adopt(self, adopted: Adopted) -> None:
        declared = self._declarations.connections[adopted.listener]
        stream = ConnectionStream(adopted.take(), adopted.state, adopted.identity)
        lazy = declared.lazy and adopted.state.waiting is Waiting.MESSAGE
        connection = BlockingConnection(self, declared, stream, adopted.session, adopted=True)
        self._add(connection, called=not lazy)

    def _open(self, declared: Connections, sock: socket.socket) -> None:
        session = declared.session() if declared.session else None
        self._add(
            BlockingConnection(self, declared, ConnectionStream(sock), session, adopted=False)
        )

    def _add(self, connection: BlockingConnection, *, called: bool = True) -> None:
        sock = connection.stream.sock
        self._served[sock.fileno()] = connection, self._make_peer(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        if called:
            self._handle(connection)
        else:
            self.watch(connection)

    def accept(self, connections: Connections, listening: Any) -> None:
        """Accept one connection, if there is one."""
        try:
            sock = accept(listening)
        except OSError as error:
            _log.error("%s: cannot accept: %s", connections.listener.name, error)
            time.sleep(0.1)  # out of FDs or memory: the backlog holds them meanwhile
            return
        if sock is not None:
            self._open(connections, sock)

    def serve(self, connection: BlockingConnection, events: int) -> None:
        """Read and write what the selector says can be, then call the handler."""
        if events & selectors.EVENT_WRITE:
            connection.stream.flush()
        if events & selectors.EVENT_READ:
            connection.stream.receive()
        self._handle(connection)

    def _handle(self, connection: BlockingConnection) -> None:
        """Call the handler unless it must wait, then see what the connection waits for."""
        stream = connection.stream
        if stream.waiting is not Waiting.CLOSING and len(stream.unsent) <= HIGH_WATER:
            stream.waiting = None
            _, peer = self._served[stream.sock.fileno()]
            try:
                connection.declared.handler(peer, **self._arguments[connection.listener])
            except ConnectionError as error:
                _log.debug("%s: %s", connection.address, error)
                stream.lose()
            except Exception:
                _log.exception("handler of %s failed", connection.address)
                connection.close()
            if stream.waiting is None:
                stream.waiting = Waiting.CLOSING if stream.eof else Waiting.MESSAGE
        if stream.lost or (stream.waiting is Waiting.CLOSING and not stream.unsent):
            self._forget(connection)
            return
        self.watch(connection)

    def watch(self, connection: BlockingConnection) -> None:
        """See to it that the loop wakes up for what the connection waits for."""
        stream = connection.stream
        known = self._served.get(stream.sock.fileno())
        if known is None or known[0] is not connection:
            return
        wanted = selectors.EVENT_WRITE if stream.unsent else 0
        if stream.waiting is Waiting.MESSAGE and len(stream.unsent) <= HIGH_WATER:
            wanted |= selectors.EVENT_READ
        if self._selector.get_key(stream.sock).events != wanted:
            self._selector.modify(stream.sock, wanted, connection)

    def _forget(self, connection: BlockingConnection) -> None:
        del self._served[connection.stream.sock.fileno()]
        self._selector.unregister(connection.stream.sock)
        connection.stream.close(shared=connection.adopted)

    def freeze(self) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes."""
        frozen: list[Moving] = []
        left: list[image.LeftBehind] = []
        self._staying = []
        for connection, _ in self._served.values():
            if connection.stream.lost:
                continue
            item: Moving | image.LeftBehind
            if self._parts.answering.crosses(connection.listener):
                item = freeze.freeze(connection.listener, connection.stream, connection.session)
            else:
                why = "backend-transfer=no"
                item = image.LeftBehind(connection.listener, connection.address, why)
            if isinstance(item, image.LeftBehind):
                left.append(item)
                self._staying.append(connection)
            else:
                frozen.append(item)
        return frozen, left

    def close_copies(self) -> None:
        """Close our copies of what has moved."""
        for connection, _ in self._served.values():
            if connection not in self._staying:
                connection.stream.sock.close()
