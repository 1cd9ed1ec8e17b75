# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has listeners listen again that a program has shut down: some do that at their end, to wake whoever waits
in accept(2), and then nobody can connect, whichever program has the listener as well. shutdown(2).
"""

import asyncio
import logging
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Self

from upgrader.errors import UpgradeError
from upgrader.protocol.kinds import show_address
from upgrader.runner.shared_sockets import SocketSettings

_log = logging.getLogger("upgrader")


class ShutListeners:
    """Looks after listeners, on the loop that runs, until it is left."""

    def __init__(self, settings: Sequence[SocketSettings]) -> None:
        #: Raises UpgradeError once nobody can connect to a listener any more: what is bound to a path or
        #: an abstract name cannot listen again.
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._all: Mapping[int, SocketSettings] = {each.sock.fileno(): each for each in settings}
        self._epoll = select.epoll()  # of a client that comes, it tells nothing

    def __enter__(self) -> Self:
        for number, each in self._all.items():
            if each.sock.type == socket.SOCK_STREAM:
                self._epoll.register(number, 0)
        asyncio.get_running_loop().add_reader(self._epoll, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll)
        self._epoll.close()
        self.lost.cancel()

    def _look(self) -> None:
        for number, _ in self._epoll.poll(0):
            each = self._all[number]
            what = f"listener {show_address(each.sock.getsockname())}"
            why = f"{what} was shut down by a program"
            if each.sock.family == socket.AF_UNIX:
                self._epoll.unregister(number)
                self._give_up(UpgradeError(f"{why}, and must be bound anew"))
                continue
            try:
                each.listen_again()
            except OSError as error:
                self._epoll.unregister(number)
                self._give_up(UpgradeError(f"{why}, and cannot listen again: {error.strerror}"))
            else:
                _log.warning("%s, and listens again; who waited there was refused", why)

    def _give_up(self, error: UpgradeError) -> None:
        if not self.lost.done():
            self.lost.set_exception(error)
