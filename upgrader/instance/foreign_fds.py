# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find what lies in the FD store under a name of ours and is something else, because another program has
put it there: it is set aside, and the service starts."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import TYPE_CHECKING

from upgrader.protocol import connection_secrets, identity, image
from upgrader.protocol.kinds import Kind
from upgrader.systemd.fdstore import Stored, StoreName

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    from upgrader.instance.commit import LoadedInstance
    from upgrader.instance.declared_backend import DeclaredBackend
    from upgrader.protocol.fd import Fd

_LARGEST_LEDGER = 64  # bytes
_SOCKETS = {Kind.LISTENER: socket.SOCK_STREAM, Kind.DATAGRAMS: socket.SOCK_DGRAM}


def set_aside(
    stored: MutableMapping[StoreName, Fd],
    repeated: Iterable[tuple[StoreName, Fd]],
    backends: Iterable[DeclaredBackend],
    loaded: LoadedInstance,
) -> None:
    """Leave in `stored` what is what its name says, one FD of each name; channels are looked at when
    they are read. `repeated`: FDs of which the name is in `stored` already."""
    for name, fd in [*stored.items(), *repeated]:
        why = _what_else(name, fd, backends)
        if stored.get(name) is fd:
            del stored[name]
        elif not why and name in stored:
            why = "there is another one of that name"
        if why:
            loaded.set_aside(name, fd, why)
        else:
            stored[name] = fd


def _what_else(name: StoreName, fd: Fd, backends: Iterable[DeclaredBackend]) -> str:
    """Say why an FD cannot be what its name says, or nothing."""
    match name.what:
        case Stored.LISTENER | Stored.DATAGRAMS:
            return _no_socket(fd, Kind(name.what))
        case Stored.IMAGE:
            return _no_memfd(fd, image.MAGIC)
        case Stored.LEDGER:
            return _no_memfd(fd) or _too_large(fd)
        case Stored.ENTRY:
            return _no_entry(name, fd, backends)
    return ""


def _no_entry(name: StoreName, fd: Fd, backends: Iterable[DeclaredBackend]) -> str:
    what = name.item.partition(".")[0]
    if what in _SOCKETS:
        return _no_socket(fd, Kind(what))
    if what in (Stored.CHANNEL, Stored.INSURANCE):
        found = identity.identify(fd)
        channel = (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        return "" if channel else f"it is {found}"
    if what == "secrets":
        return _no_memfd(fd, connection_secrets.MAGIC, b"")  # empty, once they are wiped
    for backend in backends:
        if name == backend.stored_name(0) or name.item.startswith(
            f"{backend.stored_name(0).item}+"
        ):
            return backend.foreign(fd)
    return ""


def _no_socket(fd: Fd, kind: Kind) -> str:
    """Say why it is not a socket that a service has bound."""
    found = identity.identify(fd)
    if not found.family or found.type != _SOCKETS[kind]:
        return f"it is {found}"
    if kind is Kind.LISTENER:
        with identity.borrowed(fd) as sock:
            try:
                sock.getpeername()
            except OSError:
                return ""
        return "it is a connection"
    return ""


def _no_memfd(fd: Fd, *begins: bytes) -> str:
    """Say why it is not a memfd, or not one that begins like one of these, if there are any."""
    number = fd.fileno()
    try:
        fcntl.fcntl(number, fcntl.F_GET_SEALS)
        begin = os.pread(number, len(begins[0]) if begins else 0, 0)
    except OSError:
        return f"it is {identity.identify(fd)}"
    return "" if not begins or begin in begins else f"it begins with {begin!r}, not {begins[0]!r}"


def _too_large(fd: Fd) -> str:
    size = os.fstat(fd.fileno()).st_size
    return f"it has {size} bytes" if size > _LARGEST_LEDGER else ""
