# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handing listeners to HAProxy as an old HAProxy does, so that no line of its configuration changes: it
takes with `-x PATH` whatever its `bind` lines name. Serves one program until it is closed.

The exchange is `_getsocks` of HAProxy's stats socket (src/cli.c, src/sock.c): the number of FDs, then
all of them with a namespace, an interface and options for each, then an acknowledgement.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upgrader.errors import DeclarationError

if TYPE_CHECKING:
    from upgrader.protocol.identity import HasFileno

_MOST = 252  # MAX_SEND_FD: more are sent in several messages
_COUNT = struct.Struct("i")
_ONE = b"\0\0" + _COUNT.pack(0)  # no namespace, no interface, no options
_PATIENCE = 10.0  # seconds
_ASKED = b"_getsocks"


class OldHaproxy:
    """A socket that answers as an old HAProxy would, from a thread."""

    def __init__(self, path: Path, sockets: Sequence[HasFileno]) -> None:
        """Raises OSError, and DeclarationError for too many listeners."""
        if len(sockets) > _MOST:
            raise DeclarationError("--listen", f"HAProxy is given {_MOST} listeners at most")
        self.path = path
        self._sockets = sockets
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen()
        threading.Thread(target=self._serve, name="upgrader-getsocks", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.settimeout(_PATIENCE)
                    if sock.recv(4096).startswith(_ASKED):
                        self._give(sock)

    def _give(self, sock: socket.socket) -> None:
        sock.sendall(_COUNT.pack(len(self._sockets)))
        data = _ONE * len(self._sockets)
        socket.send_fds(sock, [data], [each.fileno() for each in self._sockets])
        sock.recv(_COUNT.size)
