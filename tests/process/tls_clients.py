# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real TLS clients of a service, which keep one connection for all that they ask."""

import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.process.chat import DEADLINE
from tests.support import Closing
from upgrader.tls.keys import SUITES, Direction, Refused
from upgrader.tls.wire import KEY_UPDATE, Content, take

CERTIFICATE = Path(__file__).parents[1] / "unit" / "tls.pem"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class OpenSsl(Closing):
    """`openssl s_client`, which updates its keys if it is told to."""

    def __init__(self, port: int, *options: str) -> None:
        self._process = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.seen = b""

    def ask(self, path: str = "/") -> str:
        """The body of the next answer, whose length its head says."""
        self._say(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
        head = self._until(b"\r\n\r\n").lower()
        assert b"http/1.1 200" in head, head
        length = int(head.rpartition(b"content-length: ")[2].split(b"\r\n")[0])
        return self._take(length).decode()

    def update_keys(self, *, both: bool) -> None:
        """Send a KeyUpdate, and ask for one if `both`; nothing else is on its way."""
        self._say("K\n" if both else "k\n")
        self._until(b"KEYUPDATE\n")

    def send(self, line: str) -> None:
        self._say(f"{line}\n")

    def expect(self, text: bytes) -> None:
        self._until(text)

    def _say(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def _until(self, end: bytes) -> bytes:
        while end not in self.seen:
            self._read()
        found, _, self.seen = self.seen.partition(end)
        return found + end

    def _take(self, size: int) -> bytes:
        while len(self.seen) < size:
            self._read()
        found, self.seen = self.seen[:size], self.seen[size:]
        return found

    def _read(self) -> None:
        assert self._process.stdout
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise ConnectionError(self.seen.decode(errors="replace"))
        self.seen += data

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=DEADLINE)


class Recorded(Closing):
    """Python's own, line by line; everything that it has been sent is kept, and can be searched."""

    def __init__(self, port: int, keys: Path) -> None:
        """`keys`: a file for its secrets."""
        context = ssl.create_default_context(cafile=CERTIFICATE)
        context.check_hostname = False
        context.keylog_filename = str(keys)
        self._keys = keys
        self._sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing)
        self._wire = bytearray()
        self._plain = b""
        self._call(self._object.do_handshake)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                result = function(*arguments)
            except ssl.SSLWantReadError:
                self._sock.sendall(self._outgoing.read())
                data = self._sock.recv(65536)
                if not data:
                    raise ConnectionError("the end") from None
                self._wire += data
                self._incoming.write(data)
            else:
                self._sock.sendall(self._outgoing.read())
                return result

    def send(self, text: str) -> None:
        self._call(self._object.write, f"{text}\n".encode())

    def line(self) -> str:
        while b"\n" not in self._plain:
            data = self._call(self._object.read, 65536)
            if not data:
                raise ConnectionError("the end")
            self._plain += data
        line, _, self._plain = self._plain.partition(b"\n")
        return line.decode()

    def ask(self, text: str) -> str:
        self.send(text)
        return self.line()

    def require_no_nonce_twice(self) -> int:
        """Every record since the handshake opens under the nonce that comes next, and so under no
        earlier one; returns how many there were."""
        named = dict(
            line.split()[::2] for line in self._keys.read_text().splitlines() if line[0] != "#"
        )
        cipher = self._object.cipher()
        assert cipher
        direction = Direction(SUITES[cipher[0]], bytes.fromhex(named["SERVER_TRAFFIC_SECRET_0"]))
        rest, found = bytearray(self._wire), 0
        while record := take(rest):
            try:
                kind, data = direction.open(record)
            except Refused:
                assert not found  # what comes before is the handshake's
                direction.count = 0
                continue
            found += 1
            if kind == Content.HANDSHAKE and data[0] == KEY_UPDATE:
                direction.update()
        return found

    def close(self) -> None:
        self._sock.close()


class PythonTls(Closing):
    """Python's own, with what one context of it allows."""

    def __init__(
        self, port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> None:
        sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.sock = context.wrap_socket(sock, session=session)
        self._file = self.sock.makefile("rb")

    def ask(self, path: str = "/") -> str:
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        length = 0
        while (line := self._file.readline()) != b"\r\n":
            if not line:
                raise ConnectionError("the end")
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return self._file.read(length).decode()

    def close(self) -> None:
        self._file.close()
        self.sock.close()
