# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting the clients of a program that has not taken over: it may accept as soon as it listens."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from upgrader.runner.passing import Given
from upgrader.runner.processes import RunningProcess

_PAUSE = 0.05  # seconds between two looks at least
_SHARE = 10  # a look takes at most one in so many seconds
_LISTENS = "0A"  # TCP_LISTEN
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON, of a UNIX listener


class Accepted:
    """The connections that a program was seen with. What ends between two looks is not."""

    def __init__(self, program: RunningProcess, listeners: Sequence[Given]) -> None:
        self._program = program
        self._paths = {str(each.address) for each in listeners if isinstance(each.address, str)}
        self._ports = {each.address[1] for each in listeners if isinstance(each.address, tuple)}
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """How many there were at least."""
        return len(self._seen)

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            began = time.monotonic()
            self.look()
            await asyncio.sleep(max(_PAUSE, (time.monotonic() - began) * _SHARE))

    def look(self) -> None:
        """Look once. Needs to be allowed to look at the program: the same user, or CAP_SYS_PTRACE."""
        connections = set(self._connections())
        for process in self._program.tree() if connections else ():
            self._seen |= connections & set(_open_sockets(process.pid))

    def _connections(self) -> Iterator[str]:
        """The inodes of all connections at the listeners, as proc_net(5) has them."""
        place = Path(f"/proc/{self._program.pid}/net")
        for name in ("tcp", "tcp6") if self._ports else ():
            for words in _rows(place / name):
                if int(words[1].rpartition(":")[2], 16) in self._ports and words[3] != _LISTENS:
                    yield words[9]
        for words in _rows(place / "unix") if self._paths else ():
            listens = int(words[3], 16) & _ACCEPTS
            if not listens and len(words) > 7 and _address(words[7]) in self._paths:
                yield words[6]


def _open_sockets(pid: int) -> Iterator[str]:
    place = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for number in os.listdir(place):
            with contextlib.suppress(OSError):  # closed meanwhile
                link = os.readlink(f"{place}/{number}")
                if link.startswith("socket:["):
                    yield link[8:-1]


def _address(text: str) -> str:
    return "\0" + text[1:] if text.startswith("@") else text


def _rows(path: Path) -> list[list[str]]:
    with contextlib.suppress(OSError):
        return [line.split() for line in path.read_text(errors="replace").splitlines()[1:]]
    return []
