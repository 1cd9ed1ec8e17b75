# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that have moved here and whose clients have said nothing since: no handler runs for
them, and nothing but a place in an epoll of their own is made for each.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from upgrader.protocol.kinds import Waiting

if TYPE_CHECKING:
    import asyncio

    from upgrader.instance.adopted import Adopted

_BATCH = 256  # of them between two looks at everybody else, for less than a millisecond


class Unheard:
    """Those of one listener. `heard` is called, on the loop, with each whose client says something or
    is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, heard: Callable[[Adopted], object]) -> None:
        self._loop = loop
        self._heard = heard
        self._all: dict[int, Adopted] = {}  # by FD
        self._unwatched: set[int] = set()
        self._epoll: select.epoll | None = None
        self._held = True

    @property
    def all(self) -> Sequence[Adopted]:
        """All of them; asked from any thread."""
        return list(self._all.values())

    def take(self, adopted: Adopted) -> bool:
        """Take a connection in; False if there is something to do for it already."""
        state = adopted.state
        if state.waiting is not Waiting.MESSAGE or state.unread or state.unsent:
            return False
        number = adopted.fd.fileno()
        self._all[number] = adopted
        self._unwatched.add(number)
        return True

    def open(self) -> None:
        """Listen to them."""
        self._held = False
        if self._all:
            self._epoll = self._epoll or select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._listen)
            self._watch()

    def hold(self) -> None:
        """Listen to none of them: they stay as they are."""
        self._held = True
        if self._epoll:
            self._loop.remove_reader(self._epoll.fileno())

    def wake(self) -> None:
        """Treat all of them as if they had said something."""
        for number in [*self._all]:
            self._call(number)

    def forget(self, moved: Sequence[Adopted]) -> None:
        """These are another instance's; none is closed here."""
        self.hold()
        # Not one by one: the next instance needs the CPU now.
        if len(moved) == len(self._all):
            self._all.clear()
            self._unwatched.clear()
        for adopted in moved if self._all else ():
            self._drop(adopted.fileno())

    def end(self) -> None:
        """Listen to none any more; with thousands, the kernel takes milliseconds for that."""
        if self._epoll:
            self._epoll.close()
            self._epoll = None

    def close(self) -> None:
        """Close all of them, for their clients as well."""
        for adopted in self.all:
            self._drop(adopted.fileno())
            with contextlib.suppress(OSError), adopted.take() as sock:
                sock.shutdown(socket.SHUT_RDWR)
        self.hold()
        self.end()

    def _watch(self) -> None:
        """Watch all of them, between other work."""
        if self._held or self._epoll is None:
            return
        for _ in range(min(_BATCH, len(self._unwatched))):
            self._epoll.register(self._unwatched.pop(), select.EPOLLIN)
        if self._unwatched:
            self._loop.call_soon(self._watch)

    def _listen(self) -> None:
        if self._epoll:
            for number, _ in self._epoll.poll(0, _BATCH):
                self._call(number)

    def _call(self, number: int) -> None:
        self._heard(self._drop(number))

    def _drop(self, number: int) -> Adopted:
        if number in self._unwatched:
            self._unwatched.remove(number)
        elif self._epoll:
            # Not by closing it: as long as another process has the connection, it would be reported.
            self._epoll.unregister(number)
        return self._all.pop(number)
