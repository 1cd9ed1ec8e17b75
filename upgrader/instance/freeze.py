# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves of a connection, whatever its loop. There may be thousands, and clients wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from upgrader.errors import UnsavableState
from upgrader.instance.connection import ConnectionStream, show_peer
from upgrader.instance.frozen import Crowds, Frozen, Moving
from upgrader.instance.handled import Handled
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.state_codec import encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from upgrader.instance.adopted import Adopted

H = TypeVar("H", bound=Handled)


def freeze(listener: str, stream: ConnectionStream, session: object | None) -> Frozen | LeftBehind:
    """What moves of a connection that is not lost, with this state; or why it stays."""
    if stream.waiting is None:
        return LeftBehind(listener, show_peer(stream), "its handler is busy")
    closing = stream.waiting is Waiting.CLOSING  # all that is left of it are bytes
    if not closing and (why := stream.why_it_stays):
        return LeftBehind(listener, show_peer(stream), why)
    try:
        saved = encode(session)
    except UnsavableState as error:
        return LeftBehind(listener, show_peer(stream), str(error))
    unread, unsent = bytes(stream.inbox.buffer), bytes(stream.unsent)
    state = ConnectionState(stream.waiting, unread, unsent, saved)
    tls = None if closing else stream.snapshot()
    return Frozen(listener, stream.sock, stream.identity, state, tls)


def freeze_all(
    listener: str, connections: Iterable[H]
) -> tuple[list[Moving], list[LeftBehind], list[H]]:
    """The same for all of a listener: what moves, what stays, and the connections that move."""
    moving: list[Moving] = []
    left: list[LeftBehind] = []
    moved: list[H] = []
    crowds = Crowds()
    message = Waiting.MESSAGE
    for connection in connections:
        stream = connection.stream
        if stream.lost:
            continue
        if (
            type(stream) is ConnectionStream
            and stream.waiting is message
            and not (stream.inbox.buffer or stream.unsent)
        ):
            try:
                session = encode(connection.session)
            except UnsavableState as error:
                left.append(LeftBehind(listener, show_peer(stream), str(error)))
                continue
            crowds.add(listener, stream.sock.fileno(), stream.identity, session)
            moved.append(connection)
            continue
        item = freeze(listener, stream, connection.session)
        if isinstance(item, LeftBehind):
            left.append(item)
        else:
            moving.append(item)
            moved.append(connection)
    return [*moving, *crowds.frozen], left, moved


def freeze_again(adopted: Adopted) -> Frozen | LeftBehind:
    """The same for one that nothing has been done for since it has moved here."""
    if adopted.as_it_came:  # no handler has run: nobody has seen its session
        return Frozen(adopted.listener, adopted.fd, adopted.identity, adopted.state)
    try:
        saved = encode(adopted.session)
    except UnsavableState as error:
        return LeftBehind(adopted.listener, show_peer(adopted), str(error))
    state = ConnectionState(adopted.state.waiting, session=saved)
    return Frozen(adopted.listener, adopted.fd, adopted.identity, state)
