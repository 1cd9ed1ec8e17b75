# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers over D-Bus what the library asks PID 1 about one unit, for services under test.

https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from upgrader.systemd.bus_values import read, split

#: A value and its D-Bus signature.
Typed: TypeAlias = tuple[str, Any]

_FIXED = {"y": ("<B", 1), "b": ("<I", 4), "u": ("<I", 4), "i": ("<i", 4), "t": ("<Q", 8)}
_RETURN, _ERROR = 2, 3  # kinds of messages
_PATH, _MEMBER, _REPLY_SERIAL, _SIGNATURE = 1, 3, 5, 8  # fields of their headers


class Pid1Bus:
    """A D-Bus peer at `path` that stands for PID 1, until `close`."""

    def __init__(
        self,
        path: Path,
        properties: Callable[[], Mapping[str, Typed]],
        jobs: Callable[[], list[tuple[str, str]]],
    ) -> None:
        """`properties`: of the unit, whatever its name; `jobs`: (unit, type). Called in threads."""
        self._properties = properties
        self._jobs = jobs
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self._accept, name="pid1-bus")
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for thread, sock in list(self._open.items()):
            with contextlib.suppress(OSError):  # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._talk, args=(sock,))
            self._open[thread] = sock
            thread.start()

    def _talk(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), sock:
            self._serve(sock)
        del self._open[threading.current_thread()]

    def _serve(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            while (line := file.readline()) != b"BEGIN\r\n":
                if not line:
                    return
            sock.sendall(b"OK 0\r\n")
            while head := file.read(16):
                body, serial, fields = struct.unpack_from("<III", head, 4)
                rest = file.read(fields + -fields % 8 + body)
                told = dict(read("a(yv)", head + rest[:fields], 12)[0])
                texts = read("s" * len(told.get(_SIGNATURE, "")), rest[len(rest) - body :])
                sock.sendall(_message(serial, self._answer(str(told[_MEMBER]), texts)))

    def _answer(self, member: str, arguments: list[str]) -> Typed | None:
        """What comes back; None for an error."""
        properties = self._properties()
        match member, arguments:
            case "ListJobs", _:
                jobs = [(1, unit, kind, "running", "/", "/") for unit, kind in self._jobs()]
                return "a(usssoo)", jobs
            case "Get", [_, name] if name in properties:
                return "v", properties[name]
            case "GetAll", _:
                return "a{sv}", list(properties.items())
        return None


def _message(serial: int, answer: Typed | None) -> bytes:
    signature, value = answer or ("", None)
    body = _encode(signature, value, 0) if answer else b""
    fields: list[tuple[int, Typed]] = [(_REPLY_SERIAL, ("u", serial))]
    fields += [(_SIGNATURE, ("g", signature))] if answer else []
    kind = _RETURN if answer else _ERROR
    head = struct.pack("<4BII", ord("l"), kind, 0, 1, len(body), serial)
    head += _encode("a(yv)", fields, len(head))
    return head + bytes(-len(head) % 8) + body


def _encode(signature: str, value: Any, at: int) -> bytes:
    """One value as it stands `at` bytes into a message, with the padding before it."""
    kind = signature[0]
    if kind in _FIXED:
        layout, size = _FIXED[kind]
        return bytes(-at % size) + struct.pack(layout, value)
    match kind:
        case "s" | "o":
            data = str(value).encode()
            return bytes(-at % 4) + struct.pack("<I", len(data)) + data + b"\0"
        case "g":
            return bytes([len(value)]) + str(value).encode() + b"\0"
        case "v":
            inner, content = value
            head = _encode("g", inner, at)
            return head + _encode(inner, content, at + len(head))
        case "a":
            return _array(signature[1:], value, at)
    data = bytes(-at % 8)
    for part, item in zip(split(signature[1:-1]), value, strict=True):
        data += _encode(part, item, at + len(data))
    return data


def _array(element: str, values: list[Any], at: int) -> bytes:
    head = bytes(-at % 4) + bytes(4)
    head += bytes(-(at + len(head)) % (8 if element[0] in "({t" else 1))
    data = b""
    for value in values:
        data += _encode(element, value, at + len(head) + len(data))
    size = -at % 4
    return head[:size] + struct.pack("<I", len(data)) + head[size + 4 :] + data
