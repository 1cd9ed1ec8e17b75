# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calling the methods of another instance on its socket; who may is decided at the other end."""

from __future__ import annotations

import json

from upgrader.protocol.values import Value
from upgrader.protocol.varlink import VarlinkError, take

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from typing import Any


def call(
    sock: socket.socket, method: str, parameters: dict[str, Any], *, upgrade: bool = False
) -> dict[str, Any]:
    """Call a method of another instance; raises VarlinkError, OSError or TimeoutError.

    Reads one byte at a time at the end of the reply: what follows belongs to the stream.
    """
    _send(sock, {"method": method, "parameters": parameters, "upgrade": upgrade})
    return _next_reply(sock, bytearray(), 1 if upgrade else 65536).parameters


def watch(sock: socket.socket, method: str) -> Iterator[dict[str, Any]]:
    """Call a method with "more", and yield each of its replies; raises as `call`."""
    _send(sock, {"method": method, "more": True})
    buffer = bytearray()
    while True:
        reply = _next_reply(sock, buffer, 65536)
        yield reply.parameters
        if not reply.continues:
            return


class _Reply(Value):
    parameters: dict[str, Any]
    continues: bool


def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\0")


def _next_reply(sock: socket.socket, buffer: bytearray, at_once: int) -> _Reply:
    while (message := take(buffer)) is None:
        data = sock.recv(at_once)
        if not data:
            raise ConnectionResetError("the instance closed the connection without an answer")
        buffer += data
    try:
        reply = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise _unreadable(str(error)) from error
    if not isinstance(reply, dict):
        raise _unreadable("no object")
    parameters, name = reply.get("parameters", {}), reply.get("error", "")
    if not isinstance(parameters, dict) or not isinstance(name, str):
        raise _unreadable("parameters or error of another type")
    if name:
        raise VarlinkError(name.rpartition(".")[2], parameters)
    return _Reply(parameters, reply.get("continues") is True)


def _unreadable(why: str) -> ConnectionError:
    return ConnectionError(f"the instance gave no answer that can be read: {why}")
