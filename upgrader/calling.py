# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calling the methods of another instance on its socket; who may is decided at the other end."""

import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from upgrader import varlink
from upgrader.varlink import Call, Reply, VarlinkError


def call(
    sock: socket.socket, method: str, parameters: dict[str, Any], *, upgrade: bool = False
) -> dict[str, Any]:
    """Call a method of another instance; raises VarlinkError, OSError or TimeoutError.

    Reads one byte at a time at the end of the reply: what follows belongs to the stream.
    """
    sock.sendall(varlink.encode(Call(method, parameters, upgrade=upgrade)))
    return _next_reply(sock, bytearray(), 1 if upgrade else 65536).parameters


def watch(sock: socket.socket, method: str) -> Iterator[dict[str, Any]]:
    """Call a method with "more", and yield each of its replies; raises as `call`."""
    sock.sendall(varlink.encode(Call(method, more=True)))
    buffer = bytearray()
    while True:
        reply = _next_reply(sock, buffer, 65536)
        yield reply.parameters
        if not reply.continues:
            return


def _next_reply(sock: socket.socket, buffer: bytearray, at_once: int) -> Reply:
    while (message := varlink.take(buffer)) is None:
        data = sock.recv(at_once)
        if not data:
            raise ConnectionResetError("the instance closed the connection without an answer")
        buffer += data
    try:
        reply = msgspec.json.decode(message, type=Reply)
    except msgspec.MsgspecError as error:
        raise ConnectionError(f"the instance gave no answer that can be read: {error}") from error
    if reply.error:
        raise VarlinkError(reply.error.rpartition(".")[2], reply.parameters)
    return reply
