# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves of a connection, whatever its loop. There may be thousands, and clients wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upgrader.errors import UnsavableState
from upgrader.instance.connection import show_peer
from upgrader.instance.frozen import Frozen
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Waiting
from upgrader.protocol.state import encode

if TYPE_CHECKING:
    from upgrader.instance.adopted import Adopted
    from upgrader.instance.connection import ConnectionStream


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
