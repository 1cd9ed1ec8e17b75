# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calling the methods of another instance on its socket; who may is decided at the other end."""

from __future__ import annotations

import json
import time

from upgrader.protocol.values import Value
from upgrader.protocol.varlink import VarlinkError, decode, take

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from typing import Any


def call(
    sock: socket.socket, method: str, parameters: dict[str, Any], *, upgrade: bool = False
) -> dict[str, Any]:
    """Call a method of another instance; raises VarlinkError, OSError or TimeoutError.

    The timeout of the socket is for the whole reply, however it is cut into pieces. With `upgrade`,
    reads one byte at a time: what follows the reply belongs to the stream.
    """
    _send(sock, {"method": method, "parameters": parameters, "upgrade": upgrade})
    return _next_reply(sock, bytearray(), 1 if upgrade else 65536).parameters


def ask(sock: socket.socket, method: str) -> None:
    """Call a method without parameters, and do not wait for the reply; raises OSError."""
    _send(sock, {"method": method})


def answer(sock: socket.socket) -> dict[str, Any]:
    """The reply to what was asked; raises as `call`."""
    return _next_reply(sock, bytearray(), 65536).parameters


def watch(sock: socket.socket, method: str) -> Iterator[dict[str, Any]]:
    """Call a method with "more", and yield each of its replies; raises as `call`, whose timeout is
    for each."""
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
    # The other side takes no halves of characters, which a reason may have, of a path for instance.
    sock.sendall(json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\0")


def _next_reply(sock: socket.socket, buffer: bytearray, at_once: int) -> _Reply:
    try:
        reply = decode(_next_message(sock, buffer, at_once))
    except ValueError as error:
        raise _unreadable(str(error)) from error
    parameters, name = reply.get("parameters", {}), reply.get("error", "")
    if not isinstance(parameters, dict) or not isinstance(name, str):
        raise _unreadable("parameters or error of another type")
    if name:
        raise VarlinkError(name.rpartition(".")[2], parameters)
    return _Reply(parameters, reply.get("continues") is True)


def _next_message(sock: socket.socket, buffer: bytearray, at_once: int) -> bytes:
    timeout = sock.gettimeout()
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while (message := take(buffer)) is None:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("no whole reply in time")
                sock.settimeout(left)
            data = sock.recv(at_once)
            if not data:
                raise ConnectionResetError("the instance closed the connection without an answer")
            buffer += data
    finally:
        sock.settimeout(timeout)
    return message


def _unreadable(why: str) -> ConnectionError:
    return ConnectionError(f"the instance gave no answer that can be read: {why}")
