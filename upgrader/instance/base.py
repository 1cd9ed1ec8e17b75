# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an author declares on an instance, whatever its loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from upgrader.backends.listener import Address
from upgrader.errors import DeclarationError
from upgrader.instance.declarations import Connections, check_function
from upgrader.instance.declared_socket import Bound
from upgrader.instance.handles import Datagrams, Declared, Listener
from upgrader.instance.parts import InstanceParts
from upgrader.instance.turns import Turn
from upgrader.protocol.kinds import Kind
from upgrader.systemd.listen_fds import Passed

if TYPE_CHECKING:
    from upgrader.backends.kind import BackendKind
    from upgrader.backends.pidfd import Child
    from upgrader.protocol.identity import HasFileno

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])
K = TypeVar("K", bound="BackendKind")


class Ended(StrEnum):
    """Why `serve` has returned."""

    STOPPED = "stopped"  #: The service was stopped for good: everything was drained.
    MIGRATED = "migrated"  #: Another instance goes on with all that was here.


class BaseInstance:
    """One running process of a service. Use `upgrader.attach`; this is what both faces share.

    One instance is one process: run several as template units (`web@1`, `web@2`) on one `.socket`.
    """

    _WAITS = True  # what is declared may be a coroutine function

    def __init__(self, parts: InstanceParts) -> None:
        self._parts = parts

    @property
    def service(self) -> str:
        """The name that `attach` was given."""
        return self._parts.report.service

    @property
    def version(self) -> str:
        """The version of the program that `attach` was given, for people."""
        return self._parts.report.version

    @property
    def generation(self) -> int:
        """The number of this instance: 1 on a cold start, one more with each migration; 0 before
        `serve` has loaded it."""
        return self._parts.report.generation

    def state(self, cls: type[T]) -> Declared[T]:
        """Declare application state: loaded from the image, or made new on a cold start.

        Raises DeclarationError if `cls` is no state or is declared twice.
        """
        return Declared(self._parts.declarations.add_state(cls))

    def listener(self, name: str, *, bind: str | None = None) -> Listener:
        """Declare a stream listener, taken from the image, the FD store, a `.socket` unit with
        `FileDescriptorName=name`, or else bound to `bind`: `host:port`, `[v6]:port`, `:port` for
        all addresses of both families, `unix:/path`, `unix:@name`.

        There are several sockets if the `.socket` unit has several lines, or the host several
        addresses; all serve. An IPv6 address takes no IPv4.

        Raises DeclarationError for a bad name or address.
        """
        return Listener(self._bound(Kind.LISTENER, name, bind))

    def datagrams(
        self, name: str, *, bind: str | None = None, receive_buffer: int = 0
    ) -> Datagrams:
        """Declare a datagram socket, found in the same places as a listener.

        `receive_buffer`: bytes, as SO_RCVBUF counts them, for what comes while nobody receives, as
        in a restart: the kernel drops what does not fit. It takes several hundred bytes for each
        datagram besides its data. A larger buffer that a `.socket` unit has set stays. A smaller
        one than declared is told in the journal: without CAP_NET_ADMIN, net.core.rmem_max bounds it.

        Raises DeclarationError for a bad name, address or size.
        """
        if not 0 <= receive_buffer < 1 << 30:
            raise DeclarationError(f"datagrams {name!r}", f"receive_buffer={receive_buffer}")
        return Datagrams(self._bound(Kind.DATAGRAMS, name, bind, receive_buffer))

    def backend(self, name: str, kind: K) -> K:
        """Declare a backend of any other kind, such as `Memory(1 << 20)` or `Tap("tap0")` of
        `upgrader.backends`, or one of your own; returns that object, which is live once this instance
        is loaded: taken from the image, from the FD store, or else opened anew.

        It moves if `backend-transfer.NAME` is on in both instances; otherwise the new one opens its own.
        Raises DeclarationError for a bad name, or an object that is declared already.
        """
        self._parts.declarations.add_backend(name, kind)
        return kind

    def child(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Declare a worker that outlives this process: started once, and then the same one in every later
        generation, as the backend `name`; see `upgrader.backends.Child`. Raises DeclarationError."""
        from upgrader.backends.pidfd import Child

        return self.backend(name, Child(command, environment=environment))

    def _bound(self, kind: Kind, name: str, bind: str | None, receive_buffer: int = 0) -> Bound:
        bound = Bound(kind, name, Address.parse(bind) if bind else (), receive_buffer)
        self._parts.declarations.add_socket(bound)
        return bound

    def connections(
        self,
        listener: Listener,
        *,
        state: type | None = None,
        drains: bool = False,
        lazy: bool = False,
    ) -> Callable[[Function], Function]:
        """Declare who handles the connections of a listener, accepted and adopted ones alike.

        The handler gets the peer, and each declared state by the annotation of a parameter.
        `state` is a state class of which every connection has its own object (`peer.state`).
        A handler that is not at a safe point when all the time of an upgrade has passed ends the
        attempt; with `drains` it is left behind instead, and may end in the old instance: what
        it writes to a declared state then is lost (Retired is raised), so use it for handlers
        without one.
        With `lazy`, the handler of an adopted connection is called anew only once its client says
        something or has gone: for handlers that do nothing before their first message. On asyncio,
        thousands of idle connections then cost an upgrade next to nothing, and whoever looks at
        `peers` has all handlers called.
        Raises DeclarationError for a listener that somebody handles already, and for a parameter
        that no declared state can fill.
        """
        return self._handled(listener, session=state, drains=drains, lazy=lazy)

    def _handled(self, listener: Listener, **options: Any) -> Callable[[Function], Function]:
        """`options`: fields of `Connections`."""
        if not isinstance(listener, Listener):
            raise DeclarationError("connections()", "wants what instance.listener() has returned")

        def register(handler: Function) -> Function:
            check_function(handler, waits=self._WAITS)
            self._parts.declarations.add_connections(
                Connections(listener=listener._bound, handler=handler, **options)
            )
            return handler

        return register

    def prepare(self, prepare: Function) -> Function:
        """Declare what takes its time before this instance can take over: to fill a cache, to start
        processes.

        It is called without arguments, once, with all declared sockets open: in a live upgrade they
        are lent, with what the old instance keeps (`passed`), and that serves on until it has returned.
        Nothing is loaded then, `keep` works, and what is kept is given up if the upgrade fails. In any other start it runs
        before the checks. Whatever it raises refuses the upgrade; on asyncio it is cancelled if
        nobody waits for this instance any more.
        """
        check_function(prepare, waits=self._WAITS)
        self._parts.declarations.add_preparation(prepare)
        return prepare

    def refused(self, callback: Function) -> Function:
        """Declare what the old instance does with what a new one has kept in `prepare`, if that does
        not take over: a function that gets these items, as in `passed`, in a thread. They are given
        up when it returns, and only then is the upgrade said to have failed.
        """
        self._parts.declarations.refusals.append(callback)
        return callback

    def verify(self, check: Function) -> Function:
        """Declare a check of the loaded instance, run before it becomes the owner.

        Whatever it raises refuses the upgrade: the image stays as it was. It gets each declared
        state by the annotation of a parameter.
        """
        check_function(check, waits=self._WAITS)
        self._parts.declarations.add_check(check)
        return check

    def reload(self, callback: Function) -> Function:
        """Declare what `systemctl reload` does when there is nothing to upgrade (logrotate asks
        for it every night); what it raises fails the reload, and the instance serves on.

        It gets each declared state by the annotation of a parameter.
        """
        check_function(callback, waits=self._WAITS)
        self._parts.declarations.add_reload(callback)
        return callback

    def watch_file(self, path: str | os.PathLike[str]) -> None:
        """Declare that the program is made of a file besides its modules, such as a configuration that
        it reads at its start: if the file is another one later, `systemctl reload` is an upgrade.

        It need not be there. What `reload` reads anew by itself need not be watched.
        """
        self._parts.report.watched.add(os.fspath(path))

    def quiesce(self, function: Function) -> Function:
        """Declare what must be done before a freeze: wait until a queue is empty, flush a buffer.

        It is called twice in each attempt, in a thread unless it is a coroutine function: first while
        everybody is served, for `drain-timeout` at most, then while connections are held and turns are
        not yet, for what has come meanwhile, within `downtime-limit`. If it does not end in time, or
        raises, a live upgrade is refused, and a restart says so and goes on. It gets each declared
        state by the annotation of a parameter. Raises DeclarationError after `serve` has begun.
        """
        check_function(function, waits=self._WAITS)
        self._parts.declarations.add_quiesce(function)
        return function

    def resumed(self, function: Function) -> Function:
        """Declare what undoes `quiesce` if this instance serves on after all: let a queue be filled
        again, wake what was put to rest.

        It is called, in a thread unless it is a coroutine function, each time that connections were
        held, with the functions of `quiesce` called, and are served again; one of those that is late
        may still run then. It gets each declared state by the annotation of a parameter. Raises
        DeclarationError as `quiesce`.
        """
        check_function(function, waits=self._WAITS)
        self._parts.declarations.add_resumption(function)
        return function

    def replaced(self, function: Function) -> Function:
        """Declare what this process does at its end if another instance goes on from it: send what
        telemetry has kept, leave a cluster. No `atexit` and no destructor runs then.

        It is called, in a thread unless it is a coroutine function, once what could not move has ended,
        and may take what is left of `drain-timeout`, a second at least. The states that it gets by the
        annotations of its parameters can be read only. Raises DeclarationError as `quiesce`.
        """
        check_function(function, waits=self._WAITS)
        self._parts.declarations.add_farewell(function)
        return function

    def drop(self, name: str) -> None:
        """Declare that this program no longer has the state or backend `name`: an image with it is
        accepted."""
        self._parts.declarations.dropped.add(name)

    @property
    def passed(self) -> Sequence[Passed]:
        """What PID 1 has passed and nobody declared, each with its `name` and its open `fd`: sockets
        of `.socket` units, files of `OpenFile=`, and what the program itself has stored.

        It moves along in every mode, unless you close it. Raises DeclarationError before `serve` has
        loaded it.
        """
        return self._parts.declarations.passed

    def keep(self, name: str, fd: HasFileno) -> None:
        """Have PID 1 keep a file, a memfd say, so that it is in `passed` of this and every later
        instance, after a crash as well. What was kept under that name is given up.

        Raises DeclarationError for a bad name or before `serve` has begun (in `prepare`, it has),
        NotifyError if PID 1 cannot be told, OSError for a closed FD.
        """
        self._parts.destination.keep(name, fd)

    def forget(self, name: str) -> None:
        """Have PID 1 give up what it keeps under a name since `keep`; it is closed here as well, and
        nothing happens if there is none.

        Raises DeclarationError before `serve` has begun, NotifyError if PID 1 cannot be told.
        """
        self._parts.destination.forget(name)

    def replace(self) -> None:
        """Ask systemd for another instance in the place of this one, because of the memory that it
        has come to need, say; returns at once, and this one serves until then.

        It is a live upgrade if the unit allows that, and else a restart. A service that may ask
        systemd for neither (most that do not run as root) parks and ends where Restart= starts the
        next one. If a live upgrade fails, this instance serves on. Raises DeclarationError before
        `serve` has begun.
        """
        self._parts.replace()

    def turn(self) -> Turn:
        """Make a context manager for work that no migration cuts in two: `with` in a thread,
        `async with` in a task. Entering it waits while a migration is under way."""
        return self._parts.turns.turn()
