# SPDX-License-Identifier: LGPL-2.1-or-later
"""Count the connections of listeners that others accept from, by asking the kernel for those of a port.

sock_diag(7): one request for each family, and the kernel sends no socket of another port.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE, _ERROR = 3, 2  # NLMSG_DONE, NLMSG_ERROR
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
#: struct inet_diag_req_v2: family, protocol, extensions, states; then the socket id.
_REQUEST = struct.Struct("=BBBxI")
_ID = struct.Struct("!HH16s16s12x")  # ports and addresses; interface and cookie are 0
_OF_MESSAGE = struct.Struct("=BBBB")  # struct inet_diag_msg, before its socket id
_ESTABLISHED = 1 << 1 | 1 << 8  # TCP_ESTABLISHED, TCP_CLOSE_WAIT
_PATIENCE = 1.0  # seconds
_CONNECTED = "03"  # SS_CONNECTED, in proc_net_unix(5)


def count(sock: socket.socket) -> int:
    """How many connections of a listener are open, 0 if that cannot be told."""
    with contextlib.suppress(OSError):
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            return _at_path(name)
        if sock.type == socket.SOCK_STREAM:
            return sum(1 for address in _addresses(sock.family, name[1]) if _is(address, name[0]))
    return 0


def _is(address: str, wanted: str) -> bool:
    return wanted in (address, "0.0.0.0", "::")


def _addresses(family: int, port: int) -> Iterator[str]:
    """The local address of each connection at a port; raises OSError."""
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ESTABLISHED)
    body += _ID.pack(port, 0, b"", b"")
    header = _HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST_DUMP, 1, 0)
    size = 4 if family == socket.AF_INET else 16
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as asked:
        asked.settimeout(_PATIENCE)
        asked.send(header + body)
        while True:
            data = asked.recv(1 << 16)
            while len(data) >= _HEADER.size:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_DONE, _ERROR) or not _HEADER.size <= length <= len(data):
                    return
                of_port, _, address, _ = _ID.unpack_from(data, _HEADER.size + _OF_MESSAGE.size)
                if of_port == port:
                    yield socket.inet_ntop(family, address[:size])
                data = data[(length + 3) & ~3 :]


def _at_path(name: str | bytes) -> int:
    path = os.fsdecode(name)
    path = "@" + path[1:] if path.startswith("\0") else path
    with open("/proc/self/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        rows = (line.split(None, 7) for line in file)
        return sum(
            1
            for row in rows
            if len(row) > 7 and row[5] == _CONNECTED and row[7].rstrip("\n") == path
        )
