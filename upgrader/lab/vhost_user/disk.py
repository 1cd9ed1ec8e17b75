# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a storage daemon, as a kind of backend: connection, memory, eventfds, the ring as it stands
and the requests in flight move together, and the daemon never learns of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from typing import TYPE_CHECKING, Annotated, Any, Required, TypedDict

from msgspec import Meta

from upgrader.backends import BackendKind, EventFd, Memory, UnixSocket
from upgrader.errors import BackendError, MismatchError
from upgrader.lab.vhost_user import split_ring
from upgrader.lab.vhost_user.agreement import (
    CALL,
    CONNECTION,
    FLUSH,
    INFLIGHT,
    KICK,
    MEMORY,
    PARTS,
    Agreement,
    agree,
    ask_for_region,
    start,
)
from upgrader.lab.vhost_user.messages import DaemonSocket
from upgrader.lab.vhost_user.split_ring import Answered, Asked, Operation, SplitRing
from upgrader.protocol.fd import Fd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_Index = Annotated[int, Meta(ge=0, le=0xFFFF)]
_Slot = Annotated[int, Meta(ge=0, lt=split_ring.SLOTS)]


class RingFacts(TypedDict):
    """What was agreed on with the daemon, how many requests there were and answers were taken, modulo
    65536, and the requests in flight by slot."""

    agreed: Agreement
    available: _Index
    used: _Index
    asked: dict[_Slot, Asked]


class DiskFacts(TypedDict, total=False):
    """`part` says what the FD is; the others are those of the kind that it is of. `path`: of the daemon, as
    the program has declared it."""

    part: Required[str]
    path: str
    device: int
    inode: int
    size: int
    seals: list[str]
    id: int
    count: int
    family: int
    type: int
    protocol: int
    address: str
    ring: RingFacts


class VhostUserDisk(BackendKind, name="example.vhost-user-blk"):
    """The disk that a daemon such as qemu-storage-daemon exports on the socket `path`. `fileno()` is
    readable once requests are answered; at most SLOTS are in flight. For x86.

    After a crash it is connected anew: only the process that has ended knew what it had asked.
    """

    facts = DiskFacts
    changing = frozenset({"count", "ring"})
    persistent = False
    replayable = False

    def __init__(self, path: str, *, seconds: float = 10.0) -> None:
        """`seconds`: how long the daemon may take to agree on everything."""
        self.path = path
        self._seconds = seconds
        self._kinds: dict[str, BackendKind] = {
            CALL: EventFd(),
            CONNECTION: UnixSocket(path),
            MEMORY: Memory(split_ring.SIZE),
            KICK: EventFd(),
        }
        self._agreed = Agreement()
        self._stood = RingFacts(agreed=self._agreed, available=0, used=0, asked={})
        self._ring: SplitRing | None = None
        self._adopted = 0

    # What its kind says

    @property
    def count(self) -> int:
        """The last one is there only if the daemon keeps a region of what is in flight."""
        return len(PARTS) if self._agreed.keeps_in_flight else len(PARTS) - 1

    def open(self) -> int:
        """Connect to the daemon; raises OSError."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(self._seconds)
            sock.connect(self.path)
            return sock.detach()

    def open_all(self) -> Sequence[int]:
        """Connect, and agree with the daemon on a new ring; raises OSError, DaemonError."""
        owned = {CONNECTION: Fd(self.open())}
        try:
            for part in (CALL, MEMORY, KICK):
                owned[part] = Fd(self._kinds[part].open())
            with DaemonSocket(owned[CONNECTION].fileno(), self._seconds) as daemon:
                agreed = agree(daemon, None)
                if agreed.keeps_in_flight:
                    agreed, owned[INFLIGHT] = ask_for_region(daemon, agreed)
                start(daemon, agreed, {part: fd.fileno() for part, fd in owned.items()}, 0)
        except BaseException:
            for fd in owned.values():
                fd.close()
            raise
        self._agreed = agreed
        return [owned[part].detach() for part in PARTS if part in owned]

    def describe(self, fd: int) -> Mapping[str, Any]:
        """Say what each is, and with the memory, how the ring in it stands."""
        part = PARTS[self.fds.index(fd)]
        return self._describe(part, fd) | ({"ring": self._stands()} if part == MEMORY else {})

    def verify(self, fd: int, said: Mapping[str, Any]) -> None:
        """Raise MismatchError or BackendError unless an FD is that part of the disk of this program,
        with features that it knows."""
        part = said["part"]
        if part not in PARTS:
            raise MismatchError(self._item, part, "no part of a disk")
        if part in self._kinds and (why := self._kinds[part].refuse(fd)):
            raise BackendError(self._item, f"{part}: {why}")
        found = self._describe(part, fd)
        names = sorted({*said, *found} - self.changing)
        if wrong := [name for name in names if said.get(name) != found.get(name)]:
            raise MismatchError(self._item, _show(part, said, wrong), _show(part, found, wrong))
        if part == MEMORY:
            self._stood = self._known(said.get("ring"))
            self._agreed = self._stood["agreed"]

    def adopt(self, said: Mapping[str, Any]) -> None:
        """See that the parts have come in their order."""
        if said["part"] != PARTS[self._adopted]:
            raise MismatchError(self._item, PARTS[self._adopted], said["part"])
        self._adopted += 1

    def show(self, fd: int) -> str:
        """Say whose it is, and how many requests are in flight."""
        return f"{self.path}, {len(self._stands()['asked'])} in flight"

    # What the program does

    @property
    def capacity(self) -> int:
        """Its size in sectors of 512 bytes; 0 before `serve` has loaded it."""
        return self._agreed.capacity

    @property
    def room(self) -> int:
        """How many more requests may be in flight now. Raises as `fileno`."""
        return self._live().room

    @property
    def in_flight(self) -> list[Asked]:
        """The requests that are not answered yet. Raises as `fileno`."""
        return list(self._live().asked.values())

    @property
    def connection(self) -> int:
        """The FD of the connection: readable once the daemon has ended. Raises as `fileno`."""
        return self.fds[PARTS.index(CONNECTION)]

    def read(self, sector: int, length: int, tag: int) -> None:
        """Have `length` bytes read. Raises ValueError if they are not on the disk, or too many for one
        request; BlockingIOError if there is no room; and as `fileno`."""
        self._ask(Asked(Operation.READ, sector, length, tag), b"")

    def write(self, sector: int, data: bytes, tag: int) -> None:
        """Have `data` written. Raises as `read`."""
        self._ask(Asked(Operation.WRITE, sector, len(data), tag), data)

    def flush(self, tag: int) -> None:
        """Have what is answered by now written down for good. Raises as `read`, and ValueError for a disk
        that cannot."""
        if not self._agreed.features & FLUSH:
            raise ValueError(f"{self.path} cannot flush")
        self._ask(Asked(Operation.FLUSH, 0, 0, tag), b"")

    def answers(self) -> list[Answered]:
        """What is answered by now, each once. Raises RingError, and as `fileno`."""
        ring = self._live()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno())
        return ring.take()

    def reconnect(self) -> None:
        """Connect to the daemon that has come in the place of one that has ended: it takes up by itself
        what was in flight. Raises BackendError if the one before kept no region of that; OSError or
        DaemonGone while there is none (try again); another DaemonError; and as `fileno`."""
        ring, fds = self._live(), dict(zip(PARTS, self.fds, strict=False))
        if INFLIGHT not in fds:
            why = "nobody knows what the daemon that has ended has done of the requests in flight"
            raise BackendError(self._item, why, remedy="restart the service")
        with Fd(self.open()) as new:
            with DaemonSocket(new.fileno(), self._seconds) as daemon:
                agree(daemon, self._agreed)
                start(daemon, self._agreed, fds, ring.written)
            os.dup2(new.fileno(), fds[CONNECTION], inheritable=False)
        os.eventfd_write(fds[KICK], 1)

    # Of the ring

    def _live(self) -> SplitRing:
        """The ring, in the memory of this process."""
        number = self.fds[PARTS.index(MEMORY)]  # raises if it has moved
        if self._ring is None:
            stood, memory = self._stood, mmap.mmap(number, split_ring.SIZE)
            self._ring = SplitRing(memory, stood["available"], stood["used"], stood["asked"])
        return self._ring

    def _ask(self, request: Asked, data: bytes) -> None:
        ring, (_, sector, length, _) = self._live(), request
        if length % split_ring.SECTOR or length > split_ring.LARGEST:
            raise ValueError(f"{length} bytes cannot be asked for at a time")
        if sector < 0 or sector + length // split_ring.SECTOR > self.capacity:
            raise ValueError(f"{length} bytes at sector {sector} of {self.capacity}")
        if not ring.room:
            raise BlockingIOError(f"{split_ring.SLOTS} requests are in flight")
        ring.ask(request, data)
        os.eventfd_write(self.fds[PARTS.index(KICK)], 1)

    def _stands(self) -> RingFacts:
        """How the ring stands: as it came, until this process uses it."""
        if ring := self._ring:
            return {
                "agreed": self._agreed,
                "available": ring.available,
                "used": ring.used,
                "asked": dict(ring.asked),
            }
        return {**self._stood, "agreed": self._agreed}

    def _known(self, said: RingFacts | None) -> RingFacts:
        """What was said, unless no ring can stand like that, or no version of this program has agreed on
        it: then raise MismatchError."""
        if said is None or said["agreed"].unknown:
            raise MismatchError(self._item, said and said["agreed"], "of a program that knows less")
        in_flight = (said["available"] - said["used"]) & 0xFFFF
        if in_flight != len(said["asked"]):
            raise MismatchError(self._item, f"{in_flight} in flight", said["asked"])
        return said

    def _describe(self, part: str, fd: int) -> dict[str, Any]:
        """Give the facts of the kind that a part is of."""
        if part == INFLIGHT:  # a file of the daemon's making
            found = os.fstat(fd)
            facts = {"device": found.st_dev, "inode": found.st_ino, "size": found.st_size}
            return {"part": part, **facts}
        path = {"path": self.path} if part == CONNECTION else {}
        return {"part": part, **self._kinds[part].describe(fd), **path}


def _show(part: str, facts: Mapping[str, Any], names: Sequence[str]) -> str:
    return f"{part}: " + ", ".join(f"{name}={facts.get(name)!r}" for name in names)
