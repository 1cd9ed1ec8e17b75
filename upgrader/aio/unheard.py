# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that have moved here and whose clients have said nothing since: no handler runs for
them, and nothing but a place in an epoll of their own is made for each.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from upgrader.protocol.kinds import Waiting

if TYPE_CHECKING:
    import asyncio

    from upgrader.instance.adopted import Adopted
    from upgrader.instance.adopted_crowd import AdoptedCrowd
    from upgrader.instance.interfaces import Open

_BATCH = 256  # of them between two looks at everybody else, for less than a millisecond


class Unheard:
    """Those of one listener. `heard` is called, on the loop, with each whose client says something or
    is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, heard: Callable[[Adopted], object]) -> None:
        self._loop = loop
        self._heard = heard
        self._all: dict[int, Adopted] = {}  # by FD
        self.crowds: list[AdoptedCrowd] = []  #: those that are alike; none is empty
        self._unwatched: set[int] = set()
        self._epoll: select.epoll | None = None
        self._held = True

    @property
    def all(self) -> Sequence[Adopted]:
        """All that are not in a crowd; asked from any thread."""
        return list(self._all.values())

    @property
    def open(self) -> Sequence[Open]:
        """All of them; asked from any thread."""
        return [*self.all, *(member for crowd in [*self.crowds] for member in crowd.members)]

    def take(self, adopted: Adopted) -> bool:
        """Take a connection in; False if there is something to do for it already."""
        state = adopted.state
        if state.waiting is not Waiting.MESSAGE or state.unread or state.unsent:
            return False
        number = adopted.fd.fileno()
        self._all[number] = adopted
        self._unwatched.add(number)
        return True

    def take_crowd(self, crowd: AdoptedCrowd) -> None:
        """Take in connections that are alike."""
        self.crowds.append(crowd)
        self._unwatched.update(crowd.numbers)

    def listen(self) -> None:
        """Listen to them."""
        self._held = False
        if self._all or self.crowds:
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
        for number in self._numbers:
            self._call(number)

    def forget(self, moved: Sequence[Adopted]) -> None:
        """These and all crowds are another instance's; none is closed here."""
        self.hold()
        crowds, self.crowds = self.crowds, []
        # Not one by one: the next instance needs the CPU now.
        if len(moved) == len(self._all):
            self._all.clear()
            self._unwatched.clear()
            return
        for number in chain(*(crowd.numbers for crowd in crowds)):
            self._unwatch(number)
        for adopted in moved:
            self._drop(adopted.fileno())

    def end(self) -> None:
        """Listen to none any more; with thousands, the kernel takes milliseconds for that."""
        if self._epoll:
            self._epoll.close()
            self._epoll = None

    def close(self) -> None:
        """Close all of them, for their clients as well."""
        for number in self._numbers:
            with contextlib.suppress(OSError), self._drop(number).take() as sock:
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

    @property
    def _numbers(self) -> list[int]:
        return [*self._all, *chain(*(crowd.numbers for crowd in self.crowds))]

    def _drop(self, number: int) -> Adopted:
        self._unwatch(number)
        if adopted := self._all.pop(number, None):
            return adopted
        crowd = next(each for each in self.crowds if number in each)
        adopted = crowd.take(number)
        if not crowd:
            self.crowds.remove(crowd)
        return adopted

    def _unwatch(self, number: int) -> None:
        if number in self._unwatched:
            self._unwatched.remove(number)
        elif self._epoll:
            # Not by closing it: as long as another process has the connection, it would be reported.
            self._epoll.unregister(number)
