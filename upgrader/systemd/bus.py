# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service asks PID 1 over D-Bus: jobs, its FD store, its time to stop; no more.

It asks between SIGTERM and its end, where every millisecond is a pause for its
clients: importing a D-Bus library costs 80 ms, this costs one.
https://dbus.freedesktop.org/doc/dbus-specification.html
"""

import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import NamedTuple, Self

from upgrader.errors import BusError

#: PID 1's own socket (root only, works without a bus), then the system bus.
PRIVATE = "/run/systemd/private"
SYSTEM_BUS = "/run/dbus/system_bus_socket"

_BUS = "org.freedesktop.DBus"
_SYSTEMD = "org.freedesktop.systemd1"
_USEC_INFINITY = 2**64 - 1
_LIMIT = 1 << 20  # largest reply read, in bytes
_UNREADABLE = (OSError, struct.error, ValueError, IndexError)  # whatever a damaged reply leads to


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the service manager."""

    unit: str
    type: str  # "start", "stop", "restart", ...


class _Reply(NamedTuple):
    kind: int
    serial: int
    body: bytes


class Bus:
    """A connection to the service manager; every answer must come within `timeout` seconds of
    its opening. Raises BusError when it cannot be opened or does not answer."""

    def __init__(self, timeout: float) -> None:
        private = os.geteuid() == 0 and os.path.exists(PRIVATE)
        user = os.environ.get("XDG_RUNTIME_DIR", "") if _is_user_service() else ""
        self._path = f"{user}/systemd/private" if user else PRIVATE if private else SYSTEM_BUS
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # out of FDs
            raise BusError(f"{self._path}: {error}") from error
        self._connection = _Connection(self._sock, time.monotonic() + timeout)
        try:
            self._connection.authenticate(self._path)
            if self._path == SYSTEM_BUS:
                self._connection.call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")
        except _UNREADABLE as error:
            self._sock.close()
            raise BusError(f"{self._path}: {error or type(error).__name__}") from error

    def list_jobs(self) -> list[Job]:
        """All jobs there are."""
        body = self._ask("/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager", "ListJobs")
        try:
            return _jobs(body)
        except _UNREADABLE as error:
            raise BusError(f"ListJobs: {error}") from error

    def stored_fds(self, unit: str) -> int:
        """How many FDs the FD store of `unit` holds."""
        return self._get(unit, "NFileDescriptorStore", b"u", "<I", 4)

    def stop_timeout(self, unit: str) -> float:
        """TimeoutStopSec= of `unit` in seconds; infinity where there is none."""
        usec = self._get(unit, "TimeoutStopUSec", b"t", "<Q", 8)
        return float("inf") if usec == _USEC_INFINITY else usec / 1e6

    def restart_policy(self, unit: str) -> str:
        """Restart= of `unit`."""
        return self._get_text(unit, "Restart")

    def result(self, unit: str) -> str:
        """How the service has ended, or why it is made to end: "success", "timeout", ..."""
        return self._get_text(unit, "Result")

    def _get_text(self, unit: str, name: str) -> str:
        body = self._get_variant(unit, name)
        if body[:3] != b"\1s\0" or body[-1:] != b"\0":
            raise BusError(f"{name} of {unit} is {body!r}")
        return body[8:-1].decode(errors="replace")

    def _get_variant(self, unit: str, name: str) -> bytes:
        path = "/org/freedesktop/systemd1/unit/" + _escape(unit)
        properties = "org.freedesktop.DBus.Properties"
        return self._ask(path, properties, "Get", f"{_SYSTEMD}.Service", name)

    def _get(self, unit: str, name: str, signature: bytes, layout: str, at: int) -> int:
        """A number among the properties of a service: a variant, its value aligned to `at`."""
        body = self._get_variant(unit, name)
        if body[:3] != b"\1" + signature + b"\0" or len(body) < at + struct.calcsize(layout):
            raise BusError(f"{name} of {unit} is {body!r}")
        return int(struct.unpack_from(layout, body, at)[0])

    def _ask(self, path: str, interface: str, member: str, *arguments: str) -> bytes:
        try:
            return self._connection.call(_SYSTEMD, path, interface, member, *arguments)
        except _UNREADABLE as error:
            raise BusError(f"{self._path}: {member}: {error or type(error).__name__}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def _escape(unit: str) -> str:
    """Object paths take letters and digits only, no digit first; sd_bus_path_encode(3)."""
    label = "".join(
        chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"_{byte:02x}"
        for byte in unit.encode()
    )
    return f"_{ord(label[0]):02x}{label[1:]}" if label[:1].isdigit() else label or "_"


def _is_user_service() -> bool:
    return os.environ.get("NOTIFY_SOCKET", "").startswith("/run/user/")


class _Connection:
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._serial = 0
        self._unread = b""

    def authenticate(self, path: str) -> None:
        self._arm()
        self._sock.connect(path)
        uid = str(os.geteuid()).encode().hex()
        self._sock.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % uid.encode())
        while b"\r\n" not in self._unread:
            self._more()
        line, _, self._unread = self._unread.partition(b"\r\n")
        if not line.startswith(b"OK "):
            raise ValueError(f"authentication refused: {line!r}")

    def call(
        self, destination: str, path: str, interface: str, member: str, *arguments: str
    ) -> bytes:
        self._serial += 1
        body = b""
        for argument in arguments:
            value = argument.encode()
            body += bytes(-len(body) % 4) + struct.pack("<I", len(value)) + value + b"\0"
        fields = b""
        for code, signature, text in (
            (1, b"o", path),
            (2, b"s", interface),
            (3, b"s", member),
            (6, b"s", destination),
        ):
            value = text.encode()
            fields += bytes(-len(fields) % 8)
            fields += struct.pack("<B2sxI", code, b"\1" + signature, len(value)) + value + b"\0"
        if arguments:
            fields += bytes(-len(fields) % 8)
            fields += (
                struct.pack("<B3sB", 8, b"\1g\0", len(arguments)) + b"s" * len(arguments) + b"\0"
            )
        head = struct.pack("<4BII", ord("l"), 1, 0, 1, len(body), self._serial)
        message = head + struct.pack("<I", len(fields)) + fields
        self._arm()
        self._sock.sendall(message + bytes(-len(message) % 8) + body)
        while (reply := self._reply()).serial != self._serial or reply.kind not in (2, 3):
            pass
        if reply.kind == 3:
            raise ValueError(f"{member} was refused")
        return reply.body

    def _reply(self) -> _Reply:
        self._need(16)
        if self._unread[0] != ord("l"):
            raise ValueError("reply in a foreign byte order")
        kind = self._unread[1]
        body, _, fields = struct.unpack_from("<III", self._unread, 4)
        start = 16 + fields + -fields % 8
        if start + body > _LIMIT:
            raise ValueError(f"reply of {start + body} bytes")
        self._need(start + body)
        serial = _reply_serial(self._unread[16 : 16 + fields])
        reply = _Reply(kind, serial, self._unread[start : start + body])
        self._unread = self._unread[start + body :]
        return reply

    def _need(self, size: int) -> None:
        while len(self._unread) < size:
            self._more()

    def _more(self) -> None:
        self._arm()
        data = self._sock.recv(65536)
        if not data:
            raise ValueError("connection closed")
        self._unread += data

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self._sock.settimeout(left)


def _reply_serial(fields: bytes) -> int:
    # Field 5 has signature "u"; the others of a reply are strings, and skipped by their length.
    at = 0
    while at + 4 <= len(fields):
        code, length = fields[at], fields[at + 1]
        signature = fields[at + 2 : at + 2 + length]
        at += 3 + length
        if signature == b"g":
            at += 2 + fields[at]
        else:
            at += -at % 4
            (value,) = struct.unpack_from("<I", fields, at)
            at += 4
            if code == 5:
                return int(value)
            if signature in (b"s", b"o"):
                at += value + 1
        at += -at % 8
    return 0


def _jobs(body: bytes) -> list[Job]:
    """Unmarshal `a(usssoo)`: id, unit, type, state, job path, unit path."""
    (size,) = struct.unpack_from("<I", body)
    at, jobs = 8, []
    while at < 8 + size:
        at += -at % 8 + 4
        texts = []
        for _ in range(5):
            at += -at % 4
            (length,) = struct.unpack_from("<I", body, at)
            texts.append(body[at + 4 : at + 4 + length].decode())
            at += 4 + length + 1
        jobs.append(Job(unit=texts[0], type=texts[1]))
    return jobs
