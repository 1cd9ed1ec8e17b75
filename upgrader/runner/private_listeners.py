# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listeners that nobody else knows, for a program that is only tried."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from upgrader.backends.listener import BACKLOG
from upgrader.runner.passing import Given

_LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@contextlib.contextmanager
def private_listeners(like: Sequence[Given], directory: Path) -> Iterator[list[Given]]:
    """For each listener another one of its kind: at a port of the loopback interface, or in a directory
    that is removed afterwards. Raises OSError."""
    import tempfile  # seldom needed

    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix="try-"))
        os.chmod(place, 0o711)
        made = []
        for number, each in enumerate(like):
            with socket.socket(fileno=os.dup(each.sock.fileno())) as theirs:
                family, kind, blocking = theirs.family, theirs.type, theirs.getblocking()
            sock = stack.enter_context(socket.socket(family, kind))
            sock.setblocking(blocking)
            if family == socket.AF_UNIX:
                path = f"{place}/{number}"
                sock.bind(path)
                os.chmod(path, 0o666)
            else:
                sock.bind((_LOOPBACK[family], 0))
            if kind == socket.SOCK_STREAM:
                sock.listen(BACKLOG)
            made.append(Given(each.name, sock, sock.getsockname()))
        yield made
