# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a blocking instance that serves no more has left to send: each connection at its own speed."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterable

from upgrader.instance.connection import ConnectionStream

_LONGEST = 86400.0  # seconds; poll(2) counts milliseconds in 31 bits


def drain(
    streams: Iterable[ConnectionStream],
    deadline: float,
    wake: socket.socket,
    goes_on: Callable[[bool], bool] = bool,
) -> None:
    """Send what is unsent and close, until the deadline (of `time.monotonic`); nobody waits for who reads
    slowly.

    `goes_on` gets whether something is unsent, and says whether to go on; it is asked again whenever
    `wake` has something to read.
    """
    unsent: dict[int, ConnectionStream] = {}
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    for stream in streams:
        if stream.unsent and not stream.lost:
            unsent[stream.sock.fileno()] = stream
            poll.register(stream.sock, select.POLLOUT)
        else:
            stream.sock.close()
    while goes_on(bool(unsent)):
        left = deadline - time.monotonic()
        if unsent and left <= 0:
            for number in unsent:
                poll.unregister(number)
            _close(unsent)
            continue
        for number, _ in poll.poll(min(left, _LONGEST) * 1000 if unsent else None):
            if number == wake.fileno():
                wake.recv(4096)
                continue
            stream = unsent[number]
            stream.flush()
            if not stream.unsent:
                poll.unregister(number)
                del unsent[number]
                stream.sock.close()
    _close(unsent)


def _close(unsent: dict[int, ConnectionStream]) -> None:
    for stream in unsent.values():
        stream.sock.close()
    unsent.clear()
