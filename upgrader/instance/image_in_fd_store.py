# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image spread over the FD store, every FD under a name of its own (mechanism fd-store).

For programs that know only LISTEN_FDS, on either side of a restart, and for a handful of FDs: PID 1
compares every new FD with every stored one. A parked channel takes thousands.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence

from upgrader.errors import BusError, ChannelError
from upgrader.protocol import image, records
from upgrader.protocol.channel import ReceivedImage
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno, identify
from upgrader.protocol.ledger import count_attempt, new_ledger
from upgrader.protocol.received_fds import ReceivedFds
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.own_unit import TIMEOUT

#: More FDs than this would stop PID 1 for the better part of a second.
MOST = 256


class SpreadImage:
    """An image as a starting instance finds it: what a `ParkedChannel` is to one that is parked."""

    def __init__(self, generation: int, memfd: Fd, ledger: Fd, names: Sequence[StoreName]) -> None:
        """`names`: of all that PID 1 holds for it; the image itself comes first."""
        self.generation = generation
        self.image = memfd
        self.name = str(names[0])
        self.others = tuple(map(str, names[1:]))  #: what PID 1 holds for it besides
        self._ledger = ledger
        self._passed: dict[int, Fd] = {}  # by their inodes
        self._named: dict[StoreName, Fd] = {}

    def know(self, stored: Mapping[StoreName, Fd]) -> None:
        """All FDs that PID 1 has passed: those of the image are among them."""
        for name, fd in stored.items():
            if name.what is not Stored.ASIDE:
                self._passed[identify(fd).inode] = fd.duplicate()
            if name.what is Stored.ENTRY:
                self._named[name] = fd.duplicate()

    def count_attempt(self) -> int:
        """Count one more attempt to load; returns how many there were before."""
        return count_attempt(self._ledger)

    def peek(self) -> ReceivedImage:
        """All of it, consuming nothing; raises ImageError."""
        manifest = image.unseal(self.image)
        fds = []
        numbers: Counter[str] = Counter()  # of a backend's FDs so far
        for index, entry in enumerate(manifest.entries):
            if entry.is_declared_by_kind:  # it may have no inode of its own
                name = StoreName.of_kind(entry.kind, entry.backend, numbers[entry.backend])
                numbers[entry.backend] += 1
                own = _entry(manifest.generation, index)
                fd = self._named.pop(own, None) or self._named.pop(name, None)
            else:
                fd = self._passed.pop(entry.identity.inode, None)
            if fd is None:  # what comes after it would belong to another entry
                break
            fds.append(fd)
        cut = len(fds) < len(manifest.entries)
        reason = records.EndReason.CHANNEL_FULL if cut else records.EndReason.COMPLETE
        return ReceivedImage(
            self.generation, len(manifest.entries), self.image, self._ledger,
            ReceivedFds(fds), reason,
        )  # fmt: skip

    def spend(self) -> None:
        """PID 1 has let go of it."""
        self.close()

    def close(self) -> None:
        """Give it up without consuming anything."""
        for fd in (*self._passed.values(), *self._named.values(), self.image, self._ledger):
            fd.close()
        self._passed, self._named = {}, {}


def find(stored: Mapping[StoreName, Fd]) -> list[SpreadImage]:
    """The images among what PID 1 has passed; parts of one that is not whole are no image."""
    found = []
    for name, memfd in stored.items():
        ledger = stored.get(StoreName(Stored.LEDGER, name.item))
        if name.what is Stored.IMAGE and name.item.isdecimal() and ledger is not None:
            parts = [n for n in stored if n.what in PARTS and n.item.split(".")[0] == name.item]
            spread = SpreadImage(
                int(name.item), memfd.duplicate(), ledger.duplicate(), [name, *parts]
            )
            spread.know(stored)
            found.append(spread)
    return found


#: What is stored for an image besides the memfd itself.
PARTS = (Stored.LEDGER, Stored.ENTRY)


def _entry(generation: int, index: int) -> StoreName:
    """The name of what the image itself has put into the FD store."""
    return StoreName(Stored.ENTRY, f"{generation}.{index}")


def keep(
    manifest: image.Manifest,
    fds: Sequence[HasFileno],
    store: FdStore,
    unit: str,
    there: Container[str] = (),
) -> int:
    """Put an image into the FD store; returns how many FDs it has. `there`: backends of other kinds
    than sockets of which PID 1 has all FDs.

    Raises ChannelError or NotifyError if it cannot all be there; nothing of it is left then.
    """
    generation = str(manifest.generation)
    # Listeners are there already: of a .socket unit, or since they were bound.
    own = [
        index
        for index, entry in enumerate(manifest.entries)
        if entry.connection is not None
        or (entry.is_declared_by_kind and entry.backend not in there)
    ]
    names = [_entry(manifest.generation, index) for index in own]
    ledger, memfd = (StoreName(each, generation) for each in (Stored.LEDGER, Stored.IMAGE))
    _require_room(unit, len(own) + 2)
    try:
        for name, index in zip(names, own, strict=True):
            store.push(name, fds[index])
        with new_ledger() as fd:
            store.push(ledger, fd)
        # The image comes last: without it, the rest is none.
        with image.seal(manifest) as fd:
            store.push(memfd, fd)
    except BaseException:
        store.remove(memfd, ledger, *names)
        raise
    return len(fds)


def _require_room(unit: str, wanted: int) -> None:
    """PID 1 drops what it cannot store without a word."""
    if wanted > MOST:
        raise ChannelError(f"{wanted} FDs are too many for the FD store (limit {MOST})")
    try:
        with Bus(TIMEOUT) as bus:
            room = bus.number(unit, "FileDescriptorStoreMax") - bus.stored_fds(unit)
    except BusError as error:
        raise ChannelError(f"systemd does not say what room there is: {error}") from error
    if room < wanted:
        raise ChannelError(
            f"the FD store of {unit} has room for {room} of {wanted} FDs",
            remedy="raise FileDescriptorStoreMax= in the unit",
        )
