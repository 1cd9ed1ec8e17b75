# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets and other backends lent to a destination that prepares itself, with what the program keeps, and
what it has the source keep meanwhile: both ends of that connection. Nothing of it decides who owns anything.

After the answer to Lend the FDs come, in the order of `backends`, of `kept`, and of `others`, with a byte
for each group.
Then the destination may send a name, ended by a NUL, with one FD: the source has PID 1 keep that, and
answers with a NUL, or with why it does not.
"""

import contextlib
import socket
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from upgrader.codes import Code
from upgrader.errors import ChannelError, NotifyError
from upgrader.protocol.fd import Fd, received
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.systemd.listen_fds import Passed

_GROUP = 250  # FDs in one message; the kernel takes 253 (SCM_MAX_FD)
_LONGEST = 1024  # bytes of a message


class Borrowed:
    """What the source has lent: `sockets` by the name of their backend, what its program keeps, and the
    FDs of `others` likewise."""

    def __init__(
        self,
        sock: socket.socket,
        sockets: dict[str, list[socket.socket]],
        kept: Sequence[Passed],
        others: dict[str, list[Fd]],
    ) -> None:
        self.sockets = sockets
        self.kept = kept
        self.others = others
        self._sock = sock

    @classmethod
    def ask(cls, path: str, offer: dict[str, Any], timeout: float) -> Self | None:
        """Ask the source; None for one whose library lends nothing. Raises ChannelError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            answer = call(sock, f"{INTERFACE}.Lend", offer, upgrade=True)
            lists = [answer.get("backends"), answer.get("kept") or [], answer.get("others") or []]
            names, names_kept, names_others = (
                each if isinstance(each, list) else _unreadable() for each in lists
            )
            fds = _receive(sock, len(names) + len(names_kept) + len(names_others))
            sockets: dict[str, list[socket.socket]] = {}
            for name, fd in zip(names, fds, strict=False):
                sockets.setdefault(str(name), []).append(fd.socket())
            lent = zip(names_kept, fds[len(names) :], strict=False)
            kept = [Passed(str(name), fd) for name, fd in lent]
            others: dict[str, list[Fd]] = {}
            for name, fd in zip(names_others, fds[len(names) + len(kept) :], strict=True):
                others.setdefault(str(name), []).append(fd)
        except VarlinkError as error:
            sock.close()
            if error.name == "MethodNotFound":
                return None
            code = Code(error.parameters.get("code", Code.REFUSED))
            raise ChannelError(f"the running instance refuses: {error}", code=code) from error
        except OSError as error:
            sock.close()
            why = f"the running instance lends nothing: {error}"
            raise ChannelError(why, code=Code.SOURCE_FAILED) from error
        except BaseException:
            sock.close()
            raise
        return cls(sock, sockets, kept, others)

    def fileno(self) -> int:
        """Readable once the source has ended, as it says nothing by itself."""
        return self._sock.fileno()

    def keep(self, name: str, fd: HasFileno) -> None:
        """Have the source keep an FD; raises NotifyError if it does not."""
        try:
            socket.send_fds(self._sock, [name.encode() + b"\0"], [fd.fileno()])
            answer = self._sock.recv(_LONGEST)
        except OSError as error:
            raise NotifyError(f"the running instance did not keep {name!r}: {error}") from error
        if answer != b"\0":
            why = answer.decode(errors="replace") or "it has ended"
            raise NotifyError(f"the running instance does not keep {name!r}: {why}")

    def close(self) -> None:
        """Give up the connection; before the commit, the source takes that for the end."""
        self._sock.close()


def lend(sock: socket.socket, owners: Sequence[HasFileno]) -> None:
    """Send what is lent; raises OSError."""
    for first in range(0, len(owners), _GROUP):
        numbers = [each.fileno() for each in owners[first : first + _GROUP]]
        socket.send_fds(sock, [b"\0"], numbers)


def next_kept(sock: socket.socket) -> tuple[str, Fd] | None:
    """Wait for the next FD that is to be kept, and its name; None if the destination has hung up, or
    says what makes no sense. Raises OSError."""
    data, fds = _take(sock, _LONGEST)
    with contextlib.ExitStack() as unwanted:
        for fd in fds[1:]:
            unwanted.enter_context(fd)
        if fds and data.endswith(b"\0") and data.count(b"\0") == 1:
            return data[:-1].decode(errors="replace"), fds[0]
        for fd in fds[:1]:
            unwanted.enter_context(fd)
    return None


def _unreadable() -> NoReturn:
    raise ChannelError("the running instance lends what cannot be read")


def _receive(sock: socket.socket, count: int) -> list[Fd]:
    found: list[Fd] = []
    while len(found) < count:
        data, fds = _take(sock, 1)
        found += fds
        if not data or not fds or len(found) > count:
            raise ChannelError("the running instance lends another number of FDs than it says")
    return found


def _take(sock: socket.socket, size: int) -> tuple[bytes, list[Fd]]:
    space = socket.CMSG_SPACE(_GROUP * 4)
    data, ancillary, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    return data, received(ancillary)
