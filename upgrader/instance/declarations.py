# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program declares before it serves: states, sockets, connections, checks.

Declarations come before `serve`, live objects only as arguments: handlers, tasks and checks get
each state by the annotation of a parameter. So the wrong order cannot be written.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Sequence
from os import fstat
from typing import TYPE_CHECKING, Any, TypeVar

from upgrader.errors import DeclarationError, UnsavableState
from upgrader.instance.declared_socket import Bound, check_name
from upgrader.instance.declared_state import DeclaredState, unreadable_annotation
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later
from upgrader.protocol.values import Value
from upgrader.systemd.fdstore import StoreName

if TYPE_CHECKING:
    from upgrader.backends import datagrams
    from upgrader.backends.kind import BackendKind
    from upgrader.instance import declared_backend
    from upgrader.instance.declared_backend import DeclaredBackend
    from upgrader.protocol import saved_state, state_codec
    from upgrader.protocol.identity import HasFileno
    from upgrader.protocol.saved_state import SavedState
    from upgrader.systemd.listen_fds import Passed
else:
    declared_backend = later("upgrader.instance.declared_backend")
    datagrams = later("upgrader.backends.datagrams")
    saved_state = later("upgrader.protocol.saved_state")
    state_codec = later("upgrader.protocol.state_codec")

T = TypeVar("T")

_log = logging.getLogger("upgrader")


def check_function(function: object, *, waits: bool) -> None:
    """Raise DeclarationError for what can never be called as it is declared: what is no function, one
    that yields, and a coroutine function if nobody `waits` for it."""
    name = getattr(function, "__qualname__", repr(function))
    if inspect.iscoroutine(function):
        function.close()  # else Python warns that nobody has awaited it
        raise DeclarationError(name, "has been called", remedy="give the function, without ()")
    if not callable(function):
        raise DeclarationError(name, "is no function")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise DeclarationError(name, "yields, and nobody takes what it yields")
    if inspect.iscoroutinefunction(function) and not waits:
        raise DeclarationError(
            name, "is a coroutine function, and nothing awaits it in a program without asyncio",
            remedy="write def, or async with attach()",
        )  # fmt: skip


class Connections(Value):
    """The connections of a listener: who handles them, and the state that goes with each one.

    `drains`: one that is between two safe points may end in the instance that is replaced. `lazy`: no
    handler is called for an adopted one before its client says something. `tls`: the
    SSLContext of those that speak TLS; `moving_tls`: how those move (an `aio.tls_layer.TlsCrossing`), if
    they do.
    """

    listener: Bound
    session: type | None
    handler: Callable[..., Any]
    drains: bool = False
    lazy: bool = False
    tls: Any = None
    moving_tls: Any = None


class Protocols(Value):
    """The connections of a listener that another library owns: its adapter (an `aio.Adapter`), and
    the SSLContext of those that speak TLS.

    `drains`: one that is busy may end in the instance that is replaced, although there are states.
    `moving_tls`: as in `Connections`.
    """

    listener: Bound
    adapter: Any
    tls: Any = None
    drains: bool = False
    moving_tls: Any = None

    @property
    def header(self) -> SavedState:
        """What goes with each connection, without data."""
        adapter = self.adapter
        name = f"protocol {adapter.speaks}"
        return saved_state.SavedState(name, adapter.version, adapter.readable_from, b"")


class Declarations:
    """All that one program declares, by name. `drop` names items it lets go of."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.states: dict[str, DeclaredState[Any]] = {}
        self.sockets: dict[str, Bound] = {}
        self.backends: dict[str, DeclaredBackend] = {}  #: of other kinds
        self.connections: dict[str, Connections] = {}
        self.protocols: dict[str, Protocols] = {}
        self.checks: list[Callable[..., Any]] = []
        self.preparations: list[Callable[[], Any]] = []
        self.refusals: list[Callable[[Sequence[Passed]], object]] = []
        self.reloads: list[Callable[..., Any]] = []
        self.quiesces: list[Callable[..., Any]] = []
        self.resumptions: list[Callable[..., Any]] = []
        self.farewells: list[Callable[..., Any]] = []
        self.dropped: set[str] = set()
        self.serving = False
        self.generation = 0  #: of the instance that loads them, once an image says so
        self.activated: list[str] = []  #: what `.socket` units passed, in words
        self._passed: tuple[Passed, ...] | None = None  # what nobody declared
        self._kept: set[str] = set()  # the names of those that the program keeps

    def add_state(self, cls: type[T]) -> DeclaredState[T]:
        """Declare a state; raises DeclarationError for a second one of that name."""
        declared = DeclaredState(cls)
        self._check_new(declared.description.item, declared.description.name, self.states)
        self.states[declared.description.name] = declared
        return declared

    def add_socket(self, bound: Bound) -> None:
        """Declare a socket; raises DeclarationError for a bad name or a second one of it."""
        item = f"{bound.kind} {bound.name!r}"
        check_name(item, bound.name)
        self._check_new(item, bound.name, self.names)
        self.sockets[bound.name] = bound

    def add_backend(self, name: str, kind: BackendKind) -> None:
        """Declare a backend of another kind than a socket; raises DeclarationError for a bad name, a
        second one of it, and for an object that is declared already."""
        item = f"{kind.kind} {name!r}"
        check_name(item, name)
        self._check_new(item, name, self.names)
        if not kind.kind or kind._item:
            why = f"is {kind._item} already" if kind.kind else "is of a class without name="
            raise DeclarationError(item, why)
        self.backends[name] = declared_backend.DeclaredBackend(name, kind)

    @property
    def names(self) -> set[str]:
        """Of all backends."""
        return {*self.sockets, *self.backends}

    def add_connections(self, connections: Connections) -> None:
        """Declare who handles a listener; raises DeclarationError for a second handler."""
        name = connections.listener.name
        self._check_new(f"connections of {name!r}", name, self.connections | self.protocols)
        if connections.session is not None:
            declared: DeclaredState[Any] = DeclaredState(connections.session)
            if declared.description.tables:
                why = "a Table is a field of a state of the service, not of each connection's"
                raise DeclarationError(declared.description.item, why, remedy="use a dict there")
            declared.fill(None)
            try:
                state_codec.save(declared.value)
            except UnsavableState as error:
                raise DeclarationError(error.item, f"cannot be saved: {error.reason}") from error
        self.arguments(connections.handler, skip=1)
        self.connections[name] = connections

    def add_protocols(self, protocols: Protocols) -> None:
        """Declare whose library owns the connections of a listener; raises DeclarationError."""
        name = protocols.listener.name
        self._check_new(f"connections of {name!r}", name, self.connections | self.protocols)
        self.protocols[name] = protocols

    def add_check(self, check: Callable[..., Any]) -> None:
        """Declare a check; raises DeclarationError for a parameter that no state can fill."""
        self.arguments(check)
        self.checks.append(check)

    def add_preparation(self, prepare: Callable[[], Any]) -> None:
        """Declare what is prepared; raises DeclarationError for a function that wants a state, of
        which there is none by then."""
        if wanted := self.arguments(prepare):
            item = f"{prepare.__qualname__}({next(iter(wanted))})"
            raise DeclarationError(item, "no state is loaded while an instance prepares itself")
        self.preparations.append(prepare)

    def add_reload(self, callback: Callable[..., Any]) -> None:
        """Declare what a reload does; raises DeclarationError like `add_check`."""
        self.arguments(callback)
        self.reloads.append(callback)

    def add_quiesce(self, function: Callable[..., Any]) -> None:
        """Declare what comes before a freeze; raises DeclarationError like `add_check`, and if it is
        too late."""
        self._check_new(getattr(function, "__qualname__", "quiesce"), "", {})
        self.arguments(function)
        self.quiesces.append(function)

    def add_resumption(self, function: Callable[..., Any]) -> None:
        """Declare what undoes it; raises DeclarationError likewise."""
        self._check_new(getattr(function, "__qualname__", "resumed"), "", {})
        self.arguments(function)
        self.resumptions.append(function)

    def add_farewell(self, function: Callable[..., Any]) -> None:
        """Declare what a replaced instance does at its end; raises DeclarationError likewise."""
        self._check_new(getattr(function, "__qualname__", "replaced"), "", {})
        self.arguments(function)
        self.farewells.append(function)

    def take_passed(self, others: Sequence[Passed], kept: Sequence[Passed]) -> None:
        """Set what nobody declared: of `.socket` units, `OpenFile=` and the program's own, and what
        the program keeps."""
        self._passed = (*others, *kept)
        self._kept = {item.name for item in kept}
        for item in others:
            # Nobody may accept from it: clients would hang instead of being refused.
            level = logging.WARNING if item.is_socket else logging.INFO
            _log.log(
                level, "FD %r that PID 1 passed is not declared: see instance.passed", item.name
            )

    @property
    def passed(self) -> tuple[Passed, ...]:
        """What nobody declared; raises DeclarationError before it is loaded."""
        if self._passed is None:
            raise DeclarationError("passed", "is not there before serve() has begun")
        return self._passed

    @property
    def kept(self) -> list[Passed]:
        """What the program keeps, and has not closed."""
        return [p for p in self.passed if p.name in self._kept and p.fd.fileno() >= 0]

    def replace_kept(self, kept: Passed) -> None:
        """Add what the program keeps from now on, in place of what was under its name."""
        same = [p for p in self.passed if p.name == kept.name and p.name in self._kept]
        self._passed = (*(item for item in self.passed if item not in same), kept)
        self._kept.add(kept.name)

    def forget_kept(self, name: str) -> None:
        """Take out what the program keeps under a name, and close it."""
        gone = [p for p in self.passed if p.name == name and name in self._kept]
        self._passed = tuple(item for item in self.passed if item not in gone)
        self._kept.discard(name)
        for item in gone:
            item.fd.close()

    def datagrams_dropped(self) -> dict[int, int]:
        """How many datagrams the kernel has dropped of each datagram socket, by its inode."""
        return {
            fstat(sock.fileno()).st_ino: datagrams.dropped(sock)
            for bound in self.sockets.values()
            if bound.kind is Kind.DATAGRAMS
            for sock in bound.sockets
        }

    def beyond_image(self) -> list[tuple[str, HasFileno]]:
        """What PID 1 would pass to a start besides an image, by its FDNAME: all but the first socket
        of each backend, and what nobody declared."""
        further: list[tuple[str, HasFileno]] = []
        for bound in self.sockets.values():
            names: Sequence[StoreName | str] = bound.stored_names
            names = names or [bound.name] * len(bound.sockets)
            named = zip(names, bound.sockets, strict=True)
            further += [(str(name), sock) for name, sock in named][1:]
        for item in self.passed:
            if item.fd.fileno() >= 0:  # else the program has no use for it
                kept = item.name in self._kept
                further.append((str(StoreName.of_kept(item.name)) if kept else item.name, item.fd))
        return further

    def sessions(self) -> dict[str, SavedState]:
        """For each listener whose connections have a state of their own: its name and versions."""
        own = {
            name: state_codec.header(connections.session)
            for name, connections in self.connections.items()
            if connections.session is not None
        }
        return own | {name: protocols.header for name, protocols in self.protocols.items()}

    def moving_tls(self) -> dict[str, Any]:
        """How TLS connections move, for each listener where they do."""
        handled = {name: each.moving_tls for name, each in self.connections.items()}
        hosted = {name: each.moving_tls for name, each in self.protocols.items()}
        return {name: moving for name, moving in (handled | hosted).items() if moving is not None}

    def arguments(
        self, function: Callable[..., Any], *, skip: int = 0
    ) -> dict[str, DeclaredState[Any]]:
        """Which declared state each parameter wants; the first `skip` parameters are ours.

        Raises DeclarationError for a parameter that nothing declared can fill.
        """
        item = getattr(function, "__qualname__", repr(function))
        try:
            signature = inspect.signature(function, eval_str=True)
        except NameError as error:
            raise unreadable_annotation(item, error) from error
        wanted = {}
        for parameter in list(signature.parameters.values())[skip:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            for declared in self.states.values():
                if declared.cls is parameter.annotation:
                    wanted[parameter.name] = declared
            if parameter.name not in wanted and parameter.default is parameter.empty:
                raise DeclarationError(
                    f"{item}({parameter.name})",
                    "is annotated with no state declared before it",
                    remedy="declare it with instance.state(...) first",
                )
        return wanted

    def values(self, function: Callable[..., Any], *, skip: int = 0) -> dict[str, Any]:
        """The live states that a function wants, by parameter name."""
        wanted = self.arguments(function, skip=skip)
        return {name: declared.value for name, declared in wanted.items()}

    def _check_new(self, item: str, name: str, known: Container[str]) -> None:
        if self.serving:
            raise DeclarationError(item, "declared after serve() has begun")
        if name in known:
            raise DeclarationError(item, "is declared twice")
