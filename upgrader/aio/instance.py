# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author sees of an instance on an asyncio loop; `runtime` does the work."""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from upgrader.aio.peer import Peer
from upgrader.aio.runtime import AsyncioRuntime, Task
from upgrader.errors import DeclarationError
from upgrader.instance.base import BaseInstance, Ended, Function
from upgrader.instance.declarations import Protocols, check_function
from upgrader.instance.handles import Listener
from upgrader.instance.parts import InstanceParts
from upgrader.protocol.later import later
from upgrader.protocol.parameters import OpenTls

if TYPE_CHECKING:
    import ssl

    from upgrader.aio.adapter import Adapter
    from upgrader.aio.tls_layer import TlsCrossing
    from upgrader.instance import peers as open_peers
    from upgrader.instance.peers import Peers
else:
    open_peers = later("upgrader.instance.peers")

#: The instance whose `async with attach(...)` this code runs in.
attached: ContextVar[AsyncioInstance] = ContextVar("upgrader.aio.attached")


class AsyncioInstance(BaseInstance):
    """An instance on the running asyncio loop."""

    def __init__(self, service: str, version: str, environment: MutableMapping[str, str]) -> None:
        super().__init__(InstanceParts(service, version, environment))
        self._runtime = AsyncioRuntime(self._parts)

    @property
    def peers(self) -> Peers[Peer[Any]]:
        """All open connections that handlers of `connections` serve."""
        return open_peers.Peers(self._runtime.connections.peers)

    def connections(
        self,
        listener: Listener,
        *,
        state: type | None = None,
        drains: bool = False,
        lazy: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> Callable[[Function], Function]:
        """Declare who handles the connections of a listener, accepted and adopted ones alike.

        The handler gets the peer, and each declared state by the annotation of a parameter.
        `state` is a state class of which every connection has its own object (`peer.state`).
        A handler that is not at a safe point when all the time of an upgrade has passed ends the
        attempt; with `drains` it is left behind instead, and may end in the old instance: what
        it writes to a declared state then is lost (Retired is raised), so use it for handlers
        without one.
        With `lazy`, the handler of an adopted connection is called anew only once its client says
        something or has gone: for handlers that do nothing before their first message. Thousands of
        idle connections without TLS then cost an upgrade next to nothing, and whoever looks at
        `peers` has all handlers called.
        With `tls` they speak TLS: the handler reads and writes plain bytes, and is called once the
        handshake is done; `peer.tls` answers what was agreed. Open ones are drained or move as those
        of `protocols`.
        Raises DeclarationError for a listener that somebody handles already, and for a parameter
        that no declared state can fill.
        """
        if tls:
            from upgrader.aio import tls_stream  # noqa: F401 - before there is a pause
        return self._handled(
            listener, session=state, drains=drains, lazy=lazy, tls=tls,
            moving_tls=self._moving_tls(tls),
        )  # fmt: skip

    def protocols(
        self,
        listener: Listener,
        adapter: Adapter,
        *,
        tls: ssl.SSLContext | None = None,
        drains: bool = False,
    ) -> None:
        """Declare that a library owns the connections of a listener: uvicorn, aiohttp, one of yours.

        Idle connections move. One that is busy ends in the source, after what it is at, if the
        program declares no state. If it does, requests may write to it, and an upgrade waits for
        them as for a handler of `connections`: one that does not end in time refuses the upgrade,
        and so does a WebSocket. With `drains` they end in the source all the same; what they write
        to a state then raises Retired. With `tls` only the listener moves, and open connections
        are ended that way, unless the environment has UPGRADER_TLS=move: then those of TLS 1.3 move in a
        live upgrade, and `tls` must have no key log and no SSLObject class of its own. Raises
        DeclarationError for a listener that somebody handles already.
        """
        if not isinstance(listener, Listener):
            raise DeclarationError("protocols()", "wants what instance.listener() has returned")
        moving = self._moving_tls(tls)
        declared = Protocols(listener._bound, adapter, tls, drains, moving)
        self._parts.declarations.add_protocols(declared)

    def _moving_tls(self, context: ssl.SSLContext | None) -> TlsCrossing | None:
        """How the connections of a context move, if UPGRADER_TLS wants them to."""
        if context is None or self._parts.report.parameters.tls is not OpenTls.MOVE:
            return None
        try:
            from upgrader.aio.tls_layer import TlsCrossing
            from upgrader.tls.listener import TlsListener
        except ModuleNotFoundError as error:
            raise DeclarationError(
                "UPGRADER_TLS", f"move needs {error.name}, which is not installed here",
                remedy="pip install 'upgrader[tls]'",
            ) from error  # fmt: skip
        listener = TlsListener(context)
        self._parts.report.tls_memory = listener.memory
        return TlsCrossing(listener)

    async def serve(self, tasks: Sequence[Task] = ()) -> Ended:
        """Load, verify, tell PID 1 READY=1, and serve until this instance is stopped.

        `tasks` run from then on, and only while this instance is the owner. Raises UpgradeError if
        the instance cannot be loaded (the image stays as it was), and whatever a task raises.
        """
        if not isinstance(tasks, Collection):
            raise DeclarationError("serve(tasks=...)", "wants a list of functions")
        for task in tasks:
            check_function(task, waits=True)
        return await self._runtime.serve(tasks)

    async def __aenter__(self) -> AsyncioInstance:
        attached.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._parts.end(error)


#: Its name in `upgrader.aio`.
Instance = AsyncioInstance
