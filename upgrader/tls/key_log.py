# SPDX-License-Identifier: LGPL-2.1-or-later
"""The secrets of a connection, from the lines that OpenSSL's key log gets during its own handshake.

A client chooses the random by which lines are marked, and may copy another's, so no line is ever looked
up by it: what one call of `do_handshake` has appended belongs to that connection, and is gone then.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from upgrader.errors import DeclarationError
from upgrader.protocol.fd import Fd

_CLIENT, _SERVER = "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"
_MOST = 1 << 16  # bytes of lines that one handshake appends at most


class KeyLog:
    """The key log of one SSLContext: empty, but during a handshake."""

    def __init__(self, context: ssl.SSLContext) -> None:
        """Raises DeclarationError if the context has a key log already: that is an admin's."""
        filename = cast(str | None, context.keylog_filename)
        if filename is not None:
            raise DeclarationError(
                "UPGRADER_TLS", f"the SSLContext writes its keys to {filename}",
                remedy="unset SSLKEYLOGFILE and keylog_filename, or UPGRADER_TLS",
            )  # fmt: skip
        self._file = Fd(os.memfd_create("upgrader-keys", os.MFD_CLOEXEC))
        self._lock = threading.Lock()
        try:
            context.keylog_filename = f"/proc/self/fd/{self._file.fileno()}"
        except OSError as error:
            raise DeclarationError(
                "UPGRADER_TLS", f"/proc is not to be used here: {error}",
                remedy="let the unit see it, or unset UPGRADER_TLS",
            ) from error  # fmt: skip
        self._empty()

    @contextmanager
    def during(self, lines: list[tuple[str, ...]]) -> Iterator[None]:
        """Add to `lines` what is appended inside, in words; nobody else appends meanwhile."""
        with self._lock:
            self._empty()
            try:
                yield
            finally:
                number = self._file.fileno()
                if os.fstat(number).st_size:
                    text = os.pread(number, _MOST, 0).decode("ascii", "replace")
                    lines += [tuple(line.split()) for line in text.splitlines()]
                    self._empty()

    def _empty(self) -> None:
        os.ftruncate(self._file.fileno(), 0)


def traffic_secrets(lines: list[tuple[str, ...]], random: bytes) -> tuple[bytes, bytes] | None:
    """The first secrets of client and server, from the lines of one handshake whose ClientHello had
    this random; None unless each is there once, and all are marked with it."""
    named = [line for line in lines if len(line) == 3]
    if any(line[1].lower() != random.hex() for line in named):
        return None
    client = [line[2] for line in named if line[0] == _CLIENT]
    server = [line[2] for line in named if line[0] == _SERVER]
    if len(client) != 1 or len(server) != 1:
        return None
    try:
        return bytes.fromhex(client[0]), bytes.fromhex(server[0])
    except ValueError:
        return None
