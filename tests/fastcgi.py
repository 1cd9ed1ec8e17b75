# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of FastCGI; https://fastcgi-archives.github.io/FastCGI_Specification.html, 3.3 and 5."""

import socket
import struct

from tests.support import SETTLE


def record(kind: int, content: bytes) -> bytes:
    """One record of request 1."""
    return struct.pack("!BBHHBx", 1, kind, 1, len(content), 0) + content


def request(script: str, query: str = "") -> bytes:
    """What asks a responder for a script; the connection ends with the answer."""
    variables = {"SCRIPT_FILENAME": script, "REQUEST_METHOD": "GET", "QUERY_STRING": query}
    pairs = b"".join(
        bytes([len(name), len(value)]) + name.encode() + value.encode()
        for name, value in variables.items()
    )
    begin = struct.pack("!HB5x", 1, 0)
    return record(1, begin) + record(4, pairs) + record(4, b"") + record(5, b"")


def answer(data: bytes) -> bytes:
    """The body of the script's answer, from all that has come; raises ValueError if it is not whole."""
    text, ended = b"", False
    while len(data) >= 8:
        _, kind, _, length, padding = struct.unpack("!BBHHBx", data[:8])
        if kind == 6:
            text += data[8 : 8 + length]
        ended |= kind == 3
        data = data[8 + length + padding :]
    head, end, body = text.partition(b"\r\n\r\n")
    if not (end and ended):
        raise ValueError(f"answered {head[:200]!r}")
    return body


def ask(path: str, script: str, query: str = "") -> bytes:
    """What a script answers at the listener at a path; raises OSError or ValueError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SETTLE)
        sock.connect(path)
        sock.sendall(request(script, query))
        return answer(b"".join(iter(lambda: sock.recv(65536), b"")))
