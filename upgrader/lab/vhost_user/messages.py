# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages of vhost-user to a daemon, and what it answers: QEMU, docs/interop/vhost-user.rst."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from upgrader.protocol.fd import Fd, received

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

_HEADER = struct.Struct("<III")  # type, flags, bytes that follow
_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
_NUMBER = struct.Struct("<Q")
_FDS = 8  # room for what comes along


class MessageType(IntEnum):
    """Those that a disk needs."""

    GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 8, 9, 10
    SET_VRING_KICK, SET_VRING_CALL = 12, 13
    GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32


class ProtocolFeature(IntFlag):
    """What both sides understand besides, VHOST_USER_PROTOCOL_F_*."""

    REPLY_ACK = 1 << 3  # each message is answered, if that is asked for
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12


class DaemonError(Exception):
    """A daemon does not do what it was asked: `message` names what, `why` says what is wrong."""

    def __init__(self, message: MessageType, why: str) -> None:
        super().__init__(f"the storage daemon, asked for {message.name}, {why}")
        self.message = message
        self.why = why


class DaemonGone(DaemonError):
    """A daemon has ended meanwhile, or is just about to: another one may come in its place."""


class DaemonSocket:
    """A connected socket to a daemon, by its FD, for the `seconds` that an agreement with it may take in
    all; a context manager. The socket is non-blocking afterwards."""

    def __init__(self, fd: int, seconds: float) -> None:
        self._sock = socket.socket(fileno=os.dup(fd))
        self._until = time.monotonic() + seconds
        self.acknowledges = False  #: REPLY_ACK is agreed on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.settimeout(0)
        self._sock.close()

    def tell(self, message: MessageType, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what has no answer of its own. Raises DaemonError if it is refused, which only a daemon
        that acknowledges can say."""
        self._send(message, body, fds, _NEED_REPLY if self.acknowledges else 0)
        if self.acknowledges:
            code = _NUMBER.unpack(self._receive(message, [_NUMBER.size])[0])[0]
            if code:
                raise DaemonError(message, f"refuses with {code}")

    def ask(self, message: MessageType, body: bytes = b"", *, sizes: Sequence[int]) -> bytes:
        """The answer to a message, of one of these sizes in bytes. Raises DaemonError."""
        self._send(message, body)
        return self._receive(message, sizes)[0]

    def ask_number(self, message: MessageType) -> int:
        """An answer that is a number of 64 bits. Raises DaemonError."""
        return int(_NUMBER.unpack(self.ask(message, sizes=[_NUMBER.size]))[0])

    def tell_number(self, message: MessageType, number: int, fds: Sequence[int] = ()) -> None:
        """Send a number of 64 bits. Raises DaemonError."""
        self.tell(message, _NUMBER.pack(number), fds)

    def ask_fd(
        self, message: MessageType, body: bytes, *, sizes: Sequence[int]
    ) -> tuple[bytes, Fd]:
        """The answer to a message, with the one FD that comes along. Raises DaemonError."""
        self._send(message, body)
        answer, fds = self._receive(message, sizes)
        if len(fds) != 1:
            raise DaemonError(message, f"sends {len(fds)} FDs in place of one")
        return answer, fds[0]

    def _send(
        self, message: MessageType, body: bytes, fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        data = _HEADER.pack(message, _VERSION | flags, len(body)) + body
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._wait_at_most(message)
            sent = self._sock.sendmsg([data], passed)
        except TimeoutError:
            raise DaemonError(message, "takes no message in time") from None
        except OSError as error:
            raise DaemonGone(message, f"takes no message: {error}") from error
        if sent != len(data):
            raise DaemonError(message, f"takes only {sent} of {len(data)} bytes")

    def _receive(self, message: MessageType, sizes: Sequence[int]) -> tuple[bytes, list[Fd]]:
        header, fds = self._take(message, _HEADER.size)
        number, flags, size = _HEADER.unpack(header)
        if number != message or flags & 3 != _VERSION or not flags & _REPLY:
            raise DaemonError(message, f"answers message {number} with flags {flags:#x}")
        if size not in sizes:
            wanted = " or ".join(map(str, sizes))
            raise DaemonError(message, f"answers {size} bytes in place of {wanted}")
        body, more = self._take(message, size)
        return body, fds + more

    def _take(self, message: MessageType, size: int) -> tuple[bytes, list[Fd]]:
        data, fds = b"", list[Fd]()
        while len(data) < size:
            try:
                self._wait_at_most(message)
                part, ancillary, flags, _ = self._sock.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * _FDS), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise DaemonError(message, "does not answer in time") from None
            except OSError as error:
                raise DaemonGone(message, f"gives no answer: {error}") from error
            fds += received(ancillary)
            if flags & socket.MSG_CTRUNC:
                raise DaemonError(message, f"sends more than {_FDS} FDs")
            if not part:
                raise DaemonGone(message, "closes the connection")
            data += part
        return data, fds

    def _wait_at_most(self, message: MessageType) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise DaemonError(message, "does not answer in time")
        self._sock.settimeout(left)
