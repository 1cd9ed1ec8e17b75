# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ask PID 1 over D-Bus what a service needs: jobs, its FD store, its time to stop.

It asks between SIGTERM and its end, where every millisecond is a pause for its
clients: importing a D-Bus library costs 80 ms, this costs one.
https://dbus.freedesktop.org/doc/dbus-specification.html
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time

from upgrader.errors import BusError
from upgrader.protocol.rendezvous import BUS
from upgrader.protocol.values import Value
from upgrader.systemd.bus_values import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self

#: PID 1's own socket (root only, works without a bus), then the system bus.
PRIVATE = "/run/systemd/private"
SYSTEM_BUS = "/run/dbus/system_bus_socket"

_BUS = "org.freedesktop.DBus"
_SYSTEMD = "org.freedesktop.systemd1"
_USEC_INFINITY = 2**64 - 1
_REPLY_SERIAL = 5  # code of the header field that says which call a reply answers
_LIMIT = 1 << 20  # largest reply read, in bytes
_CONSTANT = (
    r'<property name="(\w+)"[^>]*>\s*'
    r'<annotation name="org\.freedesktop\.DBus\.Property\.EmitsChangedSignal" value="const"/>'
)
_UNREADABLE = (OSError, struct.error, ValueError, IndexError)  # whatever a damaged reply leads to


class QueuedJob(Value):
    """One job of the service manager."""

    unit: str
    type: str  # "start", "stop", "restart", ...


class _BusReply(Value):
    kind: int
    serial: int
    body: bytes


class Bus:
    """A connection to the service manager; every answer must come within `timeout` seconds of
    its opening. Raises BusError when it cannot be opened or does not answer."""

    def __init__(self, timeout: float) -> None:
        private = os.geteuid() == 0 and os.path.exists(PRIVATE)
        user = os.environ.get("XDG_RUNTIME_DIR", "") if is_user_service() else ""
        own = f"{user}/systemd/private" if user else PRIVATE if private else SYSTEM_BUS
        self._path = os.environ.get(BUS) or own
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

    def list_jobs(self) -> list[QueuedJob]:
        """All jobs there are."""
        body = self._ask("/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager", "ListJobs")
        (jobs,) = _read("a(usssoo)", body)
        return [QueuedJob(unit=unit, type=kind) for _, unit, kind, _, _, _ in jobs]

    def get(self, unit: str, name: str) -> Any:
        """A property of a service, such as `MainPID` or `ExecStartEx`."""
        path = "/org/freedesktop/systemd1/unit/" + _escape(unit)
        properties = "org.freedesktop.DBus.Properties"
        body = self._ask(path, properties, "Get", f"{_SYSTEMD}.Service", name)
        return _read("v", body)[0]

    def properties(self, unit: str) -> dict[str, Any]:
        """All properties of a unit of any kind."""
        path = "/org/freedesktop/systemd1/unit/" + _escape(unit)
        body = self._ask(path, "org.freedesktop.DBus.Properties", "GetAll", "")
        return dict(_read("a{sv}", body)[0])

    def environment(self) -> dict[str, str]:
        """The variables that PID 1 gives to every process, whatever its unit says."""
        interface = f"{_SYSTEMD}.Manager"
        properties = "org.freedesktop.DBus.Properties"
        body = self._ask("/org/freedesktop/systemd1", properties, "Get", interface, "Environment")
        items = _read("v", body)[0]
        return dict(str(item).partition("=")[::2] for item in items)

    def constants(self, unit: str, properties: Mapping[str, Any]) -> dict[str, Any]:
        """Of the properties of a service, those that PID 1 declares as constant: its settings for
        processes.

        https://dbus.freedesktop.org/doc/dbus-specification.html#introspection-format
        """
        path = "/org/freedesktop/systemd1/unit/" + _escape(unit)
        interface = f"{_SYSTEMD}.Service"
        body = self._ask(path, "org.freedesktop.DBus.Introspectable", "Introspect")
        described = str(_read("s", body)[0]).partition(f'"{interface}"')[2].partition("</interf")[0]
        names = set(re.findall(_CONSTANT, described))
        return {name: value for name, value in properties.items() if name in names}

    def begin_job(self, method: str, unit: str) -> None:
        """Have a job begun, by `ReloadUnit` or `RestartUnit`, unless another one is in its way."""
        self._ask("/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager", method, unit, "fail")

    def number(self, unit: str, name: str) -> int:
        """A number among the properties of a service."""
        value = self.get(unit, name)
        if not isinstance(value, int):
            raise BusError(f"{name} of {unit} is {value!r}")
        return value

    def time_span(self, unit: str, name: str) -> float:
        """A time span among the properties of a service, in seconds; infinity where it is off."""
        usec = self.number(unit, name)
        return float("inf") if usec == _USEC_INFINITY else usec / 1e6

    def text(self, unit: str, name: str) -> str:
        """A text among the properties of a service."""
        value = self.get(unit, name)
        if not isinstance(value, str):
            raise BusError(f"{name} of {unit} is {value!r}")
        return value

    def stored_fds(self, unit: str) -> int:
        """How many FDs the FD store of `unit` holds."""
        return self.number(unit, "NFileDescriptorStore")

    def stop_timeout(self, unit: str) -> float:
        """TimeoutStopSec= of `unit` in seconds; infinity where there is none."""
        return self.time_span(unit, "TimeoutStopUSec")

    def restart_policy(self, unit: str) -> str:
        """Restart= of `unit`."""
        return self.text(unit, "Restart")

    def result(self, unit: str) -> str:
        """How the service has ended, or why it is made to end: "success", "timeout", ..."""
        return self.text(unit, "Result")

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


def is_user_service() -> bool:
    """Whether this process belongs to a user's own service manager."""
    return os.environ.get("NOTIFY_SOCKET", "").lstrip("@").startswith("/run/user/")


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

    def _reply(self) -> _BusReply:
        self._need(16)
        if self._unread[0] != ord("l"):
            raise ValueError("reply in a foreign byte order")
        kind = self._unread[1]
        body, _, fields = struct.unpack_from("<III", self._unread, 4)
        start = 16 + fields + -fields % 8
        if start + body > _LIMIT:
            raise ValueError(f"reply of {start + body} bytes")
        self._need(start + body)
        serial = dict(read("a(yv)", self._unread[: 16 + fields], 12)[0]).get(_REPLY_SERIAL, 0)
        reply = _BusReply(kind, serial, self._unread[start : start + body])
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


def _read(signature: str, body: bytes) -> list[Any]:
    try:
        return read(signature, body)
    except ValueError as error:
        raise BusError(str(error)) from error
