# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection that a library owns: held at its safe point, frozen, released or let go.

The library is not asked and not told: while a connection is held, a gate stands between it and its
transport. In between, nothing of ours is on the way of a byte.
"""

from __future__ import annotations

import asyncio
import logging
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from upgrader.aio.adapter import Adapter
from upgrader.aio.gates import Gate, Watch
from upgrader.instance.frozen import Frozen
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.identity import Identity
from upgrader.protocol.image import LeftBehind
from upgrader.protocol.kinds import Waiting, show_address

if TYPE_CHECKING:  # loaded where TLS connections move
    from upgrader.aio.tls_layer import TlsLayer

_KEYS = "the keys of TLS cannot move"
#: What stands in an image for a connection without an end: the rest of it is a secret.
ANEW = b"anew"
_log = logging.getLogger("upgrader")


class HostedConnection:
    """A connection of a listener, between a library and its transport."""

    __slots__ = (
        "_clock_stopped",
        "_failed",
        "_gate",
        "_idle_since",
        "_watch",
        "adapter",
        "identity",
        "layer",
        "listener",
        "protocol",
        "refused",
        "since",
        "sock",
        "takes_anew",
        "tls",
        "told",
        "transport",
    )

    def __init__(
        self,
        listener: str,
        adapter: Adapter,
        identity: Identity,
        transport: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        *,
        tls: bool,
        layer: TlsLayer | None = None,
    ) -> None:
        """`layer`: what lies below a transport of TLS, if such connections can move."""
        self.listener = listener
        self.adapter = adapter
        self.identity = identity
        self.transport = transport
        self.sock: Any = transport.get_extra_info("socket")  # lives and dies with the transport
        self.protocol = protocol
        self.tls = tls
        self.layer = layer
        #: Whether the next instance, as far as it is known, can begin a handler anew.
        self.takes_anew = adapter.version >= adapter.REPLAYS
        self.refused = ""  #: why none of its listener moves, of those without TLS
        self.told = False  #: its client has been told goodbye
        self.since = time.monotonic()
        self._clock_stopped = False
        self._gate: Gate | None = None
        self._watch: Watch | None = None
        self._failed = False
        self._idle_since: float | None = None

    def fileno(self) -> int:
        """The number of its FD, -1 once it is closed."""
        return int(self.sock.fileno())

    @property
    def gone(self) -> bool:
        """Whether nothing is left to be done for it."""
        if self._watch and self._now is self._watch:
            return self._watch.lost
        return self.transport.is_closing() and not self._unsent

    @property
    def stays(self) -> bool:
        """Whether it will not come to a point at which it could move."""
        return bool(self._why_tls_stays) or (self.endless and not self.moves_anew)

    @property
    def endless(self) -> bool:
        """Whether it has no end that one could wait for."""
        return self._has_become_another or self._ask(self.adapter.lasting, True)

    @property
    def moves_anew(self) -> bool:
        """Whether it has no end and moves all the same: its handler is begun anew."""
        takes = self.takes_anew and not self._why_tls_stays
        return takes and bool(self._ask(self.adapter.replayable, False))

    @property
    def why_it_stays(self) -> str:
        """Why it cannot move; empty if it can."""
        return self._why_tls_stays or self._why_busy

    @property
    def _why_tls_stays(self) -> str:
        if self.layer:
            return self.layer.why_it_stays
        return _KEYS if self.tls else self.refused

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand and all is sent."""
        return not self._why_busy

    @property
    def waiting(self) -> Waiting | None:
        """Where it stands, as for connections with a handler."""
        return Waiting.MESSAGE if self.idle else None

    @property
    def what(self) -> str:
        """What it is at, for people."""
        return str(self._ask(self.adapter.describe, ""))

    @property
    def wants_next(self) -> bool:
        """Whether the library has nothing in hand: unsent bytes do not count."""
        return bool(self._ask(self.adapter.idle, False))

    @property
    def at_work(self) -> bool:
        """Whether the application may be at something for it; what is unsent is sent by itself."""
        endless = self.endless and not self.moves_anew
        return not self.gone and (endless or self._ask(self.adapter.answering, True))

    def hold(self, *, crosses: bool = True, anew: bool = False, refused: str = "") -> None:
        """The library goes on with what it is at, no time-out of it runs, and it gets nothing new
        if the connection can move (`crosses`; `anew`: also if it has no end; `refused`: why it cannot
        without TLS)."""
        self.takes_anew = anew
        self.refused = refused
        self._stop_clock()
        if self._gate or self.stays or isinstance(self._current, asyncio.BufferedProtocol):
            return
        if not crosses:
            return
        self._gate = Gate(self, cast(asyncio.Protocol, self._current), keeps_all=self.endless)
        self.transport.set_protocol(self._gate)

    def release(self) -> None:
        """As if it had never been held."""
        self.refused = ""
        gate, self._gate = self._gate, None
        if gate and self._now is gate:
            self.transport.set_protocol(gate.inner)
        if self.transport.is_closing():
            return
        if self._clock_stopped:
            self.start_clock()
        if gate is None:
            return
        if gate.paused:
            self.transport.resume_reading()
        if gate.held:
            gate.inner.data_received(bytes(gate.held))

    def start_clock(self) -> None:
        """Let the library's time-outs begin anew."""
        self._clock_stopped = False
        if not self._has_become_another:
            self._ask(self.adapter.start_clock, None)

    def _stop_clock(self) -> None:
        if not (self._clock_stopped or self._has_become_another or self.transport.is_closing()):
            self._clock_stopped = True
            self._ask(self.adapter.stop_clock, None)

    def freeze(self) -> Frozen | LeftBehind | None:
        """What moves; why it stays; or None if it is gone anyway."""
        if self.transport.is_closing():
            return None
        if why := self.why_it_stays:
            return LeftBehind(self.listener, self.describe(), why)
        unread = bytes(self._gate.held) if self._gate else b""
        secret = b""
        if self.endless:
            secret = self._ask(self.adapter.secret, b"")
            session = ANEW if secret else None
            unread = self._ask(self.adapter.unfinished, b"") + unread
        else:
            session = self._ask(self.adapter.save, None)
        if session is None:
            return LeftBehind(self.listener, self.describe(), "its adapter holds it back")
        state = ConnectionState(Waiting.MESSAGE, unread, b"", session)
        tls = self.layer.snapshot() if self.layer else None
        return Frozen(self.listener, self.sock, self.identity, state, tls, secret)

    def let_go(self) -> None:
        """It has moved: nothing here reads from it any more, but our copy of its FD stays open. The
        library is not told, so no handler says goodbye to a peer that is served elsewhere."""
        if self.endless:
            self._ask(self.adapter.let_go, None)
        self.transport.set_protocol(asyncio.Protocol())
        if self.layer:
            self.layer.give_up()
        else:
            self.transport.pause_reading()

    def close_copy(self) -> None:
        """Close our copy of an FD that has moved."""
        if not self.layer:
            self.transport.abort()

    def finish(self) -> None:
        """It could not move: it ends here, after what it is at."""
        self.release()
        self._watch_its_end()
        if not self._has_become_another:
            self._ask(self.adapter.finish, None)

    def end(self, *, answers: bool = True) -> None:
        """Close it once it is idle; until then, it ends after what it is at. `answers`: what its
        client has sent already is answered first; else no application is asked any more."""
        if self.transport.is_closing():
            return
        idle = self.idle and not self.endless
        if (idle and not self._has_unread) if answers else not (self.endless or self.at_work):
            self._watch_its_end()
            self.transport.close()
        else:
            self.finish()

    def end_if_idle(self, seconds: float) -> None:
        """Close it once it has been idle for so long; asked again and again."""
        now = time.monotonic()
        if not self.idle or self.endless:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= seconds:
            self.end()

    def close(self) -> None:
        """Its time is up."""
        self.told = True
        self.release()
        self._watch_its_end()
        if not self.transport.is_closing():
            self._ask(self.adapter.close, None)

    def describe(self) -> str:
        """Who it is and what it is at, for people."""
        name = self.transport.get_extra_info("peername")
        return f"{show_address(name) or 'unix peer'} {self.what}"

    @property
    def _has_become_another(self) -> bool:
        """Whether the library has put another protocol in its place, as for a WebSocket."""
        return self._current is not self.protocol

    @property
    def _why_busy(self) -> str:
        if self._has_become_another and not self.moves_anew:
            return "it speaks another protocol by now"
        if self._unsent:
            return "not all is sent"
        return "" if self.wants_next else "it is busy"

    @property
    def _current(self) -> asyncio.BaseProtocol:
        """The library's protocol, whatever of ours stands before it."""
        now = self._now
        if now is self._watch and self._watch:
            return self._watch.inner
        if now is self._gate and self._gate:
            return self._gate.inner
        return self.protocol if now is None else now

    # A transport that is closed has forgotten some of this, and one of TLS raises then.

    @property
    def _now(self) -> asyncio.BaseProtocol | None:
        try:
            return self.transport.get_protocol()
        except AttributeError:
            return None

    @property
    def _unsent(self) -> int:
        try:
            below = self.layer.unsent if self.layer else 0
            return self.transport.get_write_buffer_size() + below
        except AttributeError:
            return 0

    @property
    def _has_unread(self) -> bool:
        if self._gate and self._gate.held:
            return True
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _watch_its_end(self) -> None:
        """With TLS, what is written and not sent may lie below, where nobody sees it."""
        current = self._now
        if self.tls and current is not None and current is not self._watch:
            inner = self._gate.inner if self._gate and current is self._gate else current
            self._watch = Watch(cast(asyncio.Protocol, inner))
            self.transport.set_protocol(self._watch)

    def _ask(self, function: Callable[[Any], Any], otherwise: Any) -> Any:
        """Ask the adapter; one that fails keeps its connection here, and harms no other."""
        try:
            return function(self._current)
        except Exception:
            if not self._failed:  # asked often, it would fill the log
                _log.exception("%s: adapter of %s failed", self.listener, self.adapter.speaks)
            self._failed = True
            return otherwise
