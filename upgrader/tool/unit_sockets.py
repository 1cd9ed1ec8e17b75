# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find what the processes of a unit listen on, by looking at their sockets themselves: in whatever
network namespace they are, and with options that no table in /proc shows."""

import contextlib
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from upgrader.protocol.kinds import show_address
from upgrader.tool import process_fd

#: The sockets of the library itself, under the names at which they were bound.
CONTROL = re.compile(r"/(\.(upgrader|status|draining-\d+)\.sock\.\d+|upgrader-run-[0-9a-f]+)$")
_LONGEST_INTERFACE = 16  # bytes: IFNAMSIZ
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True)
class OpenSocket:
    """A socket that takes what comes from outside: a listener, or a bound datagram socket.

    `address` is written as for --listen; `pids` are the processes that have it. `removed`: a UNIX
    socket whose path leads to it no more, or was given to it by renaming another. `interface`: the only
    one that it takes anything from, if it does.
    """

    inode: int
    kind: socket.SocketKind
    address: str
    pids: frozenset[int]
    removed: bool = False
    interface: str = ""

    @property
    def is_stream(self) -> bool:
        """Whether it is a listener."""
        return self.kind == socket.SOCK_STREAM

    def __str__(self) -> str:
        if self.address.startswith("unix:"):
            return f"UNIX {self.address.removeprefix('unix:')}"
        where = f"*{self.address}" if self.address.startswith(":") else self.address
        return f"{'TCP' if self.is_stream else 'UDP'} {where}"


def open_sockets(pids: Iterable[int]) -> tuple[OpenSocket, ...]:
    """All of these processes but ours, the oldest first; raises PermissionError for one that may not be
    looked at."""
    found: dict[int, OpenSocket] = {}
    seen: set[int] = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for number in map(int, os.listdir(f"/proc/{pid}/fd")):
                inode = _inode(pid, number)
                if before := found.get(inode):
                    found[inode] = replace(before, pids=before.pids | {pid})
                elif inode and inode not in seen:
                    seen.add(inode)
                    if new := _look(pid, number, inode):
                        found[inode] = new
    return tuple(found[inode] for inode in sorted(found))


def _inode(pid: int, number: int) -> int:
    try:
        match = _SOCKET.fullmatch(os.readlink(f"/proc/{pid}/fd/{number}"))
    except FileNotFoundError:  # closed by now
        return 0
    return int(match[1]) if match else 0


def _look(pid: int, number: int, inode: int) -> OpenSocket | None:
    """The socket, if it takes what comes from outside."""
    try:
        taken = process_fd.duplicate(pid, number)
    except PermissionError:
        raise
    except OSError:  # closed by now
        return None
    with socket.socket(fileno=taken.detach()) as sock:
        if sock.family not in _FAMILIES or sock.type not in (
            socket.SOCK_STREAM, socket.SOCK_DGRAM,
        ):  # fmt: skip
            return None
        name = sock.getsockname()
        if sock.type == socket.SOCK_STREAM:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return None
        elif not _takes_datagrams(sock, name):
            return None
        removed = False
        if isinstance(name, str) and name.startswith("/"):
            if CONTROL.search(name):
                return None
            removed = not os.path.exists(f"/proc/{pid}/root{name}")
        return OpenSocket(
            inode, sock.type, _address(sock, name), frozenset((pid,)), removed, _interface(sock)
        )


def _takes_datagrams(sock: socket.socket, name: object) -> bool:
    """One that was bound on purpose, and talks to nobody in particular."""
    with contextlib.suppress(OSError):
        sock.getpeername()
        return False
    if isinstance(name, tuple):
        return name[1] != 0 and name[1] not in _ephemeral()
    return isinstance(name, str) and name.startswith("/")


def _address(sock: socket.socket, name: object) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{show_address(name)}"
    if sock.family == socket.AF_INET6 and isinstance(name, tuple) and name[0] == "::":
        only = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        return show_address(name) if only else f":{name[1]}"
    return show_address(name)


def _interface(sock: socket.socket) -> str:
    with contextlib.suppress(OSError):  # a UNIX socket has none
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LONGEST_INTERFACE)
        return found.partition(b"\0")[0].decode(errors="replace")
    return ""


def _ephemeral() -> range:
    """Ports of the kernel's choice: who has one asks, and is not asked."""
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, _EPHEMERAL.read_text().split())
        return range(low, high + 1)
    return range(0)
