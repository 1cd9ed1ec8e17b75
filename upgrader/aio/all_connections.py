# SPDX-License-Identifier: LGPL-2.1-or-later
"""All connections of an instance on an asyncio loop, whoever serves them: a handler, or a library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upgrader.aio.handled_listener import HandledListener
from upgrader.aio.safe_points import SafePoints
from upgrader.aio.waiting import cancel
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.parts import InstanceParts
from upgrader.protocol.collector import no_collection
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later

if TYPE_CHECKING:
    from upgrader.aio import hosted_end, hosted_listener, readers, replays
    from upgrader.aio.handled_connection import HandledConnection
    from upgrader.aio.peer import Peer
    from upgrader.instance.frozen import Moving
    from upgrader.instance.interfaces import Open
    from upgrader.protocol import image
    from upgrader.protocol.identity import HasFileno
else:
    hosted_listener = later("upgrader.aio.hosted_listener")
    hosted_end = later("upgrader.aio.hosted_end")
    readers = later("upgrader.aio.readers")


class AllConnections:
    """Does with the connections of all listeners what the instance has decided."""

    def __init__(self, parts: InstanceParts) -> None:
        self.handled: dict[str, HandledListener] = {}  #: by listener, since `adopt`
        self.hosted: dict[str, hosted_listener.HostedListener] = {}  #: by listener, since `host`
        self.safe_points = SafePoints()
        self._parts = parts
        self._declarations = parts.declarations
        self._loop = asyncio.get_running_loop()

    def all_open(self) -> Sequence[tuple[str, Open]]:
        """Those that are open, each with its listener."""
        open_here: list[tuple[str, Open]] = []
        for name, handled in self.handled.items():
            open_here += [(name, each) for each in handled.open_connections]
        for name, hosting in self.hosted.items():
            open_here += [(name, hosted) for hosted in hosting.connections if not hosted.gone]
        return open_here

    @property
    def peers(self) -> list[tuple[HandledConnection, Peer[Any]]]:
        """Those that have a handler and are open, and how that sees them."""
        return [each for handled in self.handled.values() for each in handled.peers]

    # The beginning

    def host(self) -> None:
        """Make room for those of libraries."""
        with_state = bool(self._declarations.states)
        for name, declared in self._declarations.protocols.items():
            self.hosted[name] = hosted_listener.HostedListener(
                self._loop, declared, with_state=with_state
            )

    def prepare(self, loaded: LoadedInstance) -> None:
        """Have the libraries load theirs; nothing is read from them yet. Raises UnreadableState."""
        for name, hosting in self.hosted.items():
            hosting.prepare([item for item in loaded.adopted if item.listener == name])

    def adopt(self, loaded: LoadedInstance) -> None:
        """Begin the handlers of those that have one; they come to their first wait."""
        for name, declared in self._declarations.connections.items():
            arguments = self._declarations.values(declared.handler, skip=1)
            self.handled[name] = HandledListener(declared, arguments, self.safe_points)
        with no_collection():
            for adopted in loaded.adopted:
                if adopted.listener in self.handled:
                    self.handled[adopted.listener].adopt(adopted)
            for crowd in loaded.crowds:
                self.handled[crowd.listener].adopt_crowd(crowd)

    def take_arrivals(self) -> list[replays.MovedAnew]:
        """Those of libraries that have no end, whose handlers have to begin anew."""
        return [each for hosting in self.hosted.values() for each in hosting.take_arrivals()]

    def let_in(self) -> None:
        """Let all clients in."""
        self.safe_points.open()
        for handled in self.handled.values():
            handled.open()
        for hosting in self.hosted.values():
            hosting.open()

    # A migration

    def freeze(self) -> tuple[list[Moving], list[image.LeftBehind]]:
        """What moves, and what stays and why; nothing changes, and nothing else may run meanwhile."""
        frozen: list[Moving] = []
        left: list[image.LeftBehind] = []
        for name, handled in self.handled.items():
            moving, staying = handled.freeze(crosses=self._parts.answering.crosses(name))
            frozen += moving
            left += staying
        for hosting in self.hosted.values():
            hosted, staying = hosting.freeze()
            frozen += hosted
            left += staying
        return frozen, left

    def give_up(self) -> None:
        """Touch nothing that has moved any more; the rest ends after what it is at."""
        self._let_go()
        for hosting in self.hosted.values():
            # Our states are another instance's by now: no new request may write to them here.
            hosting.finish(replaced=True)
        self.safe_points.open()
        for handled in self.handled.values():
            handled.finish()

    def drop(self) -> None:
        """Touch nothing that has moved any more, and cut the rest: this process ends."""
        self._let_go()
        for hosting in self.hosted.values():
            hosting.drop_rest()

    def _let_go(self) -> None:
        self._read_no_more()
        for handled in self.handled.values():
            handled.let_go()
        for hosting in self.hosted.values():
            hosting.let_go()

    def _read_no_more(self) -> None:
        """What comes for a backend is another instance's: no callback of the program gets it any more."""
        declared = self._declarations
        moved = [
            fd.fileno() for each in declared.backends.values() if each.moved for fd in each.fds
        ]
        socks = [sock.fileno() for bound in declared.sockets.values() for sock in bound.sockets]
        connections: list[HasFileno] = [
            *(each.stream for handled in self.handled.values() for each in handled.connections),
            *(each for hosting in self.hosted.values() for each in hosting.connections),
        ]
        readers.watch_no_more(self._loop, moved + socks, {each.fileno() for each in connections})

    def close_copies(self) -> None:
        """Close our copies of what has moved."""
        for handled in self.handled.values():
            handled.close_copies()
        for hosting in self.hosted.values():
            hosting.close_copies()
        for bound in self._declarations.sockets.values():
            bound.close()

    def in_hand(self) -> tuple[int, int]:
        """How many messages handlers wanted to send after their connections had moved, and of how many
        of these."""
        counts = [hosting.in_hand() for hosting in self.hosted.values()]
        return sum(each for each, _ in counts), sum(each for _, each in counts)

    # The end

    async def all_ended(self, deadline: float, stop: asyncio.Event) -> None:
        """Wait until all that did not move has ended; cut the rest by the deadline (of
        `time.monotonic`), or at `stop`."""
        if self.hosted:
            parameters = self._parts.report.parameters
            begin = time.monotonic() + parameters.websocket_timeout
            goodbyes = hosted_end.Goodbyes(begin, parameters.websocket_spread)
            await hosted_end.end_all(self.hosted.values(), deadline, stop, goodbyes)
        for handled in self.handled.values():
            await handled.all_ended(deadline, stop)

    async def end(self, tasks: Sequence[asyncio.Task[Any]], deadline: float) -> None:
        """End `tasks` and all handlers, with their `finally` blocks, and send what is unsent, by the
        deadline (of `time.monotonic`)."""
        handlers = [task for handled in self.handled.values() for task in handled.tasks]
        for handled in self.handled.values():
            handled.close_unheard()
        for hosting in self.hosted.values():
            hosting.finish()
        await cancel([*tasks, *handlers], deadline)
        if self.hosted:
            await hosted_end.end_all(self.hosted.values(), deadline)
        for handled in self.handled.values():
            await handled.all_sent(deadline)
        for bound in self._declarations.sockets.values():
            if bound.kind is Kind.LISTENER:
                bound.close()
