# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel does with datagrams while nobody receives: it keeps or drops them. See socket(7)."""

import socket
import struct

_SO_RCVBUFFORCE = 33  # Linux: above net.core.rmem_max, with CAP_NET_ADMIN
_SO_MEMINFO = 55  # Linux 4.12
_MEMINFO = struct.Struct("9I")
_HELD, _ROOM, _DROPS = 0, 1, 8  # SK_MEMINFO_RMEM_ALLOC, _RCVBUF, _DROPS


def enlarge(sock: socket.socket, wanted: int) -> int:
    """Give a socket a receive buffer of at least `wanted` bytes, as SO_RCVBUF counts them; returns
    how many it has now, which may be less: net.core.rmem_max bounds it without CAP_NET_ADMIN."""
    if _size(sock) < wanted:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
    return _size(sock)


def _size(sock: socket.socket) -> int:
    # The kernel doubles what it is told, for its own overhead, and tells that.
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def dropped(sock: socket.socket) -> int:
    """How many datagrams a socket has not taken since it was made, because its receive buffer was
    full; modulo 2^32."""
    return _memory(sock)[_DROPS]


def crowded(sock: socket.socket) -> bool:
    """Whether more than half of the receive buffer is taken."""
    memory = _memory(sock)
    return 2 * memory[_HELD] > memory[_ROOM]


def _memory(sock: socket.socket) -> tuple[int, ...]:
    return _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
