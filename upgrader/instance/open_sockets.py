# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding the sockets of a declared backend: in the image, the FD store, a `.socket` unit, or by
binding them; no FD under a name of its own is ever used for another one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence

from upgrader.backends.listener import Address, bind, is_shut, listen_again, path_inode
from upgrader.errors import BindError, BusError, DeclarationError, MismatchError
from upgrader.instance.commit import LoadedInstance, Rebinding
from upgrader.instance.declarations import Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.protocol.fd import Fd
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.listen_fds import Passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.instance.interfaces import Closeable
    from upgrader.protocol import identity, image, state_shape
    from upgrader.systemd import bus, own_unit
else:
    identity = later("upgrader.protocol.identity")
    image = later("upgrader.protocol.image")
    state_shape = later("upgrader.protocol.state_shape")
    bus = later("upgrader.systemd.bus")
    own_unit = later("upgrader.systemd.own_unit")

#: A host has an address here that this machine has not got, or not of that family.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_log = logging.getLogger("upgrader")


class _Candidate:
    """A socket that this backend had before: what PID 1 calls it, and the inode of its path."""

    def __init__(
        self, sock: socket.socket, stored: StoreName | None = None, inode: int = 0
    ) -> None:
        self.sock = sock
        self.stored = stored
        self.inode = inode


class Opening:
    """All that PID 1 has passed, apart from images, and what is opened of it."""

    def __init__(
        self, declarations: Declarations, loaded: LoadedInstance, unit: str, opened: list[Closeable]
    ) -> None:
        """`unit`: this one's name, empty outside of systemd; `opened` gets whatever must be closed
        should the instance refuse to load."""
        self._declarations = declarations
        self._loaded = loaded
        self._unit = unit
        self._opened = opened
        self.stored: dict[StoreName, Fd] = {}  #: what the library has put into the FD store
        self.repeated: list[tuple[StoreName, Fd]] = []  #: further ones of these names
        self.others: list[Passed] = []  #: under other names: of `.socket` units, and foreign ones

    def add(self, item: Passed) -> None:
        """Take what PID 1 has passed, here or to the instance before."""
        name = StoreName.parse(item.name)
        if name is None:
            self.others.append(item)
        elif name in self.stored:
            self.repeated.append((name, item.fd))
        else:
            self.stored[name] = item.fd

    def kept(self) -> list[Passed]:
        """What the program has told the library to keep, under the program's names for it."""
        found = [(name.kept, name) for name in self.stored]
        return [Passed(kept, self.stored.pop(name)) for kept, name in found if kept]

    def open(
        self,
        bound: Bound,
        received: tuple[image.ManifestEntry, socket.socket] | None,
        *,
        moved: bool,
        passed: bool,
    ) -> None:
        """Open one backend; `received` is its first socket in the image. `moved`: PID 1 has passed
        nothing here, so what there is has come from the instance before; and `passed`: there, it was
        of a `.socket` unit.

        Raises MismatchError, DeclarationError if there is nothing to open, and BindError.
        """
        activated = self._activated(bound)
        if received and received[0].identity in map(identity.identify, activated):
            received[1].close()
            received = None
        kept = [received[1]] if received and (moved and (activated or passed)) else []
        if activated or kept:
            bound.persistent = False
            bound.open(*kept, *activated)
            if received and not kept:
                self._loaded.replaced.append((bound, received[1]))  # the .socket unit has changed
            for name in self._names(bound):
                # What we bound before there was a .socket unit.
                self._discard(bound, _Candidate(self._socket(name), name))
            return
        candidates = [_Candidate(received[1], None, received[0].path_inode)] if received else []
        for name in self._names(bound):
            self._add_stored(candidates, name)
        bound.persistent = True
        if bound.addresses:
            self._choose(bound, candidates)
        elif candidates:
            self._use(bound, [each.sock for each in candidates], candidates)
        else:
            passed_here = state_shape.name_some([repr(item.name) for item in self.others])
            also = f", but {passed_here}, which is not declared," if passed_here else ""
            raise DeclarationError(
                f"{bound.kind} {bound.name!r}",
                f"PID 1 passed none of that name{also} and there is no bind= address",
                remedy=f"add a .socket unit with FileDescriptorName={bound.name}",
            )

    def _activated(self, bound: Bound) -> list[socket.socket]:
        """The sockets of a .socket unit by name, or the only one if only one is declared."""
        named = [item for item in self.others if item.name == bound.name]
        if not named and len(self._declarations.sockets) == 1:
            named = self._only_one(bound)
        fitting = [item for item in named if _is_for(bound, identity.identify(item.fd))]
        if named and not fitting:
            what = identity.identify(named[0].fd)
            raise MismatchError(f"{bound.kind} {bound.name!r}", bound.socket_type.name, what)
        socks = []
        for item in fitting:
            self.others.remove(item)
            sock = item.fd.socket()
            self._opened.append(sock)
            sock.setblocking(False)
            socks.append(sock)
        return socks

    def _only_one(self, bound: Bound) -> list[Passed]:
        """What the unit's only .socket listens on, whatever it is called there."""
        found = [item for item in self.others if _takes_new(bound, item.fd)]
        if len({item.name for item in found}) != 1:
            return []
        if self._unit:
            # It may as well be one that the program has stored for itself.
            with contextlib.suppress(BusError), bus.Bus(own_unit.TIMEOUT) as pid1:
                by = pid1.properties(self._unit).get("TriggeredBy", [])
                return found if sum(each.endswith(".socket") for each in by) == 1 else []
        return found

    def _names(self, bound: Bound) -> list[StoreName]:
        """The names of all sockets of a backend in the FD store, in their order."""
        first = StoreName.of_backend(bound.kind, bound.name, 0)
        start = f"{bound.kind}.{bound.name}."
        numbers = sorted(
            int(number)
            for name in self.stored
            if name.what is Stored.ENTRY
            and name.item.startswith(start)
            and (number := name.item.removeprefix(start)).isdecimal()
        )
        further = [StoreName.of_backend(bound.kind, bound.name, number) for number in numbers]
        return [name for name in (first, *further) if name in self.stored]

    def _socket(self, name: StoreName) -> socket.socket:
        fd = self.stored.pop(name)
        try:
            sock = fd.socket()
        except OSError:
            raise MismatchError(str(name), "a socket", identity.identify(fd)) from None
        self._opened.append(sock)
        return sock

    def _add_stored(self, candidates: list[_Candidate], name: StoreName) -> None:
        sock = self._socket(name)
        inode = os.fstat(sock.fileno()).st_ino
        for each in candidates:
            if os.fstat(each.sock.fileno()).st_ino == inode:
                each.stored = name
                sock.close()
                return
        candidates.append(_Candidate(sock, name))

    def _choose(self, bound: Bound, candidates: list[_Candidate]) -> None:
        """For each address what is bound there already, or else a new socket."""
        alone = len(bound.addresses) == 1
        left = list(candidates)
        found: list[_Candidate | None] = []
        for address in bound.addresses:
            fits = [each for each in left if _fits(address, each, alone=alone)][:1]
            found.append(fits[0] if fits else None)
            left = [each for each in left if each not in fits]
        wanted: list[socket.socket | Address] = []
        late: list[Address] = []  # bound only when what is replaced has been released
        failure: OSError | None = None
        for address, candidate in zip(bound.addresses, found, strict=True):
            if candidate:
                wanted.append(candidate.sock)
                continue
            in_the_way = [each.sock for each in left if address.has_port_of(each.sock)]
            if bound.kind is Kind.DATAGRAMS:
                for sock in in_the_way:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                shared = bound.kind is Kind.DATAGRAMS and bool(in_the_way)
                sock = bind(address, bound.socket_type, shared=shared)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and in_the_way:
                    wanted.append(address)
                    late.append(address)
                elif error.errno in _NOT_HERE and not alone:
                    failure = error
                else:
                    raise BindError(f"{bound.kind} {bound.name!r}", str(error.strerror)) from error
            else:
                self._opened.append(sock)
                wanted.append(sock)
        if not wanted:
            assert failure is not None
            raise BindError(f"{bound.kind} {bound.name!r}", str(failure.strerror)) from failure
        for each in left:
            self._discard(bound, each)
        if late:
            # Until then whoever looks at it sees what there is.
            old = [each.sock for each in left]
            bound.open(*[item for item in wanted if isinstance(item, socket.socket)] or old)
            self._loaded.rebinding.append(Rebinding(bound, old, wanted))
            self._loaded.unwanted.append(StoreName.of_backend(bound.kind, bound.name, 0))
        else:
            self._use(bound, [w for w in wanted if isinstance(w, socket.socket)], candidates)

    def _use(
        self, bound: Bound, socks: Sequence[socket.socket], candidates: Sequence[_Candidate]
    ) -> None:
        bound.open(*socks)
        for number, sock in enumerate(socks):
            if bound.kind is Kind.LISTENER:
                listen_again(sock)
            name = StoreName.of_backend(bound.kind, bound.name, number)
            known = [each for each in candidates if each.sock is sock]
            if known and known[0].stored == name and name not in self._loaded.unwanted:
                continue
            if not known:
                self._loaded.unwanted.append(name)
            elif known[0].stored:
                self._loaded.unwanted.append(known[0].stored)
            self._loaded.persistent.append((name, sock))

    def _discard(self, bound: Bound, candidate: _Candidate) -> None:
        """It is replaced: whoever waits there is served, and then nothing is left of it."""
        self._loaded.replaced.append((bound, candidate.sock))
        first = StoreName.of_backend(bound.kind, bound.name, 0)
        self._loaded.unwanted.append(candidate.stored or first)


def _is_for(bound: Bound, identity: identity.Identity) -> bool:
    return bool(identity.family) and identity.type == bound.socket_type


def _takes_new(bound: Bound, fd: Fd) -> bool:
    """Whether an FD is a socket on which somebody new may come, of the kind that is declared."""
    if not _is_for(bound, identity.identify(fd)):
        return False
    with fd.duplicate().socket() as sock:
        accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(accepts) or bound.kind is Kind.DATAGRAMS


def _fits(address: Address, candidate: _Candidate, *, alone: bool) -> bool:
    """Whether a socket is still what the program wants, and can still be reached."""
    sock = candidate.sock
    if not address.matches(sock, alone=alone):
        return False
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX or not isinstance(name, str) or not name:
        return True
    if name.startswith("/") and sock.type == socket.SOCK_STREAM and is_shut(sock):
        return False
    found = path_inode(sock)
    return found != 0 and candidate.inode in (0, found)
