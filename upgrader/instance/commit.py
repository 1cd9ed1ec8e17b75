# SPDX-License-Identifier: LGPL-2.1-or-later
"""A loaded instance between its loading and its commit, and the commit itself."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from upgrader.backends.listener import Address, bind, listen_again, release
from upgrader.errors import BindError, NotifyError
from upgrader.instance.declared_socket import Bound
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later
from upgrader.protocol.rendezvous import BUS
from upgrader.protocol.status_text import FACTS, Origin, Status, to_json
from upgrader.systemd.fdstore import FdStore, Stored, StoreName, removal
from upgrader.systemd.notify import one_line

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from upgrader.instance import image_in_fd_store
    from upgrader.instance.adopted import Adopted
    from upgrader.instance.adopted_crowd import AdoptedCrowd
    from upgrader.instance.declared_backend import DeclaredBackend
    from upgrader.instance.gap import Gap
    from upgrader.instance.image_in_fd_store import SpreadImage
    from upgrader.instance.live_destination import LiveDestination
    from upgrader.protocol import connection_secrets
    from upgrader.protocol.channel import ParkedChannel
    from upgrader.protocol.fd import Fd
    from upgrader.protocol.identity import HasFileno
    from upgrader.systemd.notify import Notifier
else:
    image_in_fd_store = later("upgrader.instance.image_in_fd_store")
    connection_secrets = later("upgrader.protocol.connection_secrets", loading=True)

#: Bytes: PID 1 takes 4096 in all, and drops what is longer, READY=1 included.
_FACTS = 1000
_LARGEST_DATAGRAM = 1 << 20  # bytes; UNIX ones are bounded by the sender's buffer only

_log = logging.getLogger("upgrader")


class Rebinding:
    """A listener whose new address is free only once the old one, on the same port, is released.

    That is the last thing before the commit, because a client that has been accepted from the old
    one then is lost if the commit fails. `wanted`: the sockets, and the addresses still to be bound.
    """

    def __init__(
        self,
        bound: Bound,
        old: Sequence[socket.socket],
        wanted: Sequence[socket.socket | Address],
    ) -> None:
        self.bound = bound
        self.old = old
        self.wanted = wanted
        self._made: list[socket.socket] = []

    def perform(self) -> list[tuple[StoreName, socket.socket]]:
        """Release and bind; returns all sockets with their names for the FD store. Raises BindError,
        and the old ones listen again."""
        for old in self.old:
            _take_backlog(self.bound, old)
            release(old)
        socks = []
        try:
            for item in self.wanted:
                if isinstance(item, Address):
                    item = bind(item, self.bound.socket_type)
                    self._made.append(item)
                socks.append(item)
        except OSError as error:
            self.undo()
            raise BindError(
                f"{self.bound.kind} {self.bound.name!r}", str(error.strerror)
            ) from error
        self.bound.open(*socks)
        kind, name = self.bound.kind, self.bound.name
        return [(StoreName.of_backend(kind, name, n), sock) for n, sock in enumerate(socks)]

    def undo(self) -> None:
        """Have the old ones listen again: another instance serves."""
        for sock in self._made:
            sock.close()
        for old in self.old:
            with contextlib.suppress(OSError):
                listen_again(old)


class LoadedInstance:
    """A loaded instance before its commit."""

    def __init__(self) -> None:
        self.status = Status(1, Origin.COLD)
        self.adopted: list[Adopted] = []
        self.crowds: list[AdoptedCrowd] = []  #: that were adopted besides
        self.channel: ParkedChannel | SpreadImage | None = None
        self.migration: LiveDestination | None = None
        self.stayed: dict[str, int] = {}  #: how many were left behind, by the reason
        self.frozen_at: int | None = None  #: CLOCK_MONOTONIC in nanoseconds: nobody serves since
        self.gap: Gap | None = None  #: in which datagrams may have been dropped
        self.backends: list[DeclaredBackend] = []  #: that have moved here, and are no sockets
        self.overrides: Mapping[str, str] = {}  #: set at run time, inherited
        self.replaced: list[tuple[Bound, socket.socket]] = []
        self.rebinding: list[Rebinding] = []
        self.unwanted: list[StoreName] = []  #: to leave the FD store
        self.persistent: list[tuple[StoreName, HasFileno]] = []  #: to enter it
        self.aside: list[tuple[StoreName, Fd]] = []  #: what is none of ours, to be kept there
        self.secrets: Fd | None = None  #: of `adopted`; wiped once this instance is the owner

    def set_aside(self, name: StoreName, fd: Fd, why: str) -> None:
        """Keep in the FD store, under another name, what is not what its name says; and only the newest,
        or somebody who does that at each start would fill it."""
        aside = StoreName(Stored.ASIDE, f"{name.what}-{name.item}")
        _log.error(
            "%s in the FD store is none of ours: %s; it is kept there as %s, and not used",
            name, why, aside,
        )  # fmt: skip
        self.unwanted += (name, aside)
        self.aside.append((aside, fd))

    def each_adopted(self) -> Iterator[Adopted]:
        """All connections, one by one."""
        yield from self.adopted
        for crowd in self.crowds:
            for number in crowd.numbers:
                yield crowd.take(number)

    def commit(self, notifier: Notifier, store: FdStore, serve: Callable[[], None]) -> None:
        """Become the owner: tell PID 1 in one datagram, then mark the channel as spent. `serve` runs
        as soon as this instance owns everything.

        In a live migration it is the Ack that counts: PID 1 has long been told READY=1, and
        listens to its main process only, which is another one for some milliseconds: `settle`
        does the rest. Raises NotifyError if PID 1 cannot be told, ChannelError if the source has
        given up waiting; the image is not consumed then.
        """

        owned = False

        def own() -> None:
            nonlocal owned
            owned = True
            if self.migration:
                self._note_pause()
            if self.secrets:
                connection_secrets.wipe(self.secrets)
                self.secrets.close()
            for bound, old in self.replaced:
                _take_backlog(bound, old)
                old.close()
            for backend in self.backends:
                backend.guard()
            serve()

        try:
            for each in self.rebinding:
                self.persistent += each.perform()
            if self.migration:
                self.migration.acknowledge(own)
            else:
                self._note_pause()
                self._commit(notifier, store)
                own()
        except BaseException:
            if not owned:
                for each in self.rebinding:
                    each.undo()
            raise

    def settle(self, notifier: Notifier, store: FdStore) -> None:
        """Tell PID 1 what it takes from its main process only; raises NotifyError."""
        self._tidy(store)
        # From here on WatchdogSec= counts for this process.
        notifier.send("WATCHDOG=1", f"STATUS={one_line(self.status.status_text)}", *self._facts())

    def _facts(self) -> tuple[str, ...]:
        """What only `upgrader.testing` is told, which plays the part of PID 1."""
        if BUS not in os.environ:
            return ()
        told = to_json(self.status)
        if len(told) > _FACTS:
            told = to_json(self.status.replace(dropped=(), unsaved=()))
        return (f"{FACTS}={told}",)

    def _tidy(self, store: FdStore, *, more_follows: bool = False) -> None:
        kept = [*self.persistent, *self.aside]
        store.remove(*self.unwanted, more_follows=more_follows or bool(kept))
        for place, (name, owner) in enumerate(kept, 1):
            try:  # one at a time is in flight, of those that a user may have in all
                store.push(name, owner, more_follows=more_follows and place == len(kept))
            except NotifyError as error:  # with too many FDs of this user in flight, none can go
                _log.warning("%s would not survive a crash: %s", name, error)
        for _, fd in self.aside:
            fd.close()

    def _note_pause(self) -> None:
        if self.gap:
            self.status = self.status.replace(datagrams_lost=self.gap.begin_to_receive())
        if self.frozen_at is not None:
            pause = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - self.frozen_at
            self.status = self.status.replace(pause=max(0, round(pause / 1e9, 4)))

    def _commit(self, notifier: Notifier, store: FdStore) -> None:
        self._tidy(store, more_follows=True)
        removed = removal(self.channel.name) if self.channel else ()
        notifier.send(
            "READY=1", f"STATUS={one_line(self.status.status_text)}", *removed, *self._facts()
        )
        # The datagram is queued, and PID 1 will get to it: from here on there is no way back.
        try:
            notifier.barrier()
        except NotifyError as error:
            _log.warning("%s", error)
        if self.channel:
            store.remove(*self.channel.others)
            self.channel.spend()


def _take_backlog(bound: Bound, old: socket.socket) -> None:
    """Take what already waits on a socket that is replaced."""
    old.setblocking(False)
    try:
        while True:
            if bound.kind is Kind.LISTENER:
                bound.backlog.append(old.accept()[0])
            else:
                bound.backlog.append(old.recvfrom(_LARGEST_DATAGRAM))
    except OSError:
        count = len(bound.backlog)
        _log.info("%s %r: %d came from the one it replaces", bound.kind, bound.name, count)
