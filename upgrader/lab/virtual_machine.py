# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine in a private systemd as its users see it: what its guest says, and when, and pings."""

import contextlib
import ctypes
import itertools
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upgrader.lab.private_systemd import PrivateSystemd

HOST, GUEST = "10.77.0.1", "10.77.0.2"  #: addresses of the machine's two ends
PREFIX = 24
PERIOD = 0.01  # seconds between two pings
_LATE = 1.0  # seconds after which a ping is lost
_LOOK = 0.002  # seconds between two looks at a console
_ECHO = struct.Struct(
    "!BBHHHI"
)  # ICMP echo: type, code, checksum, identifier, sequence, our number
_OURS = 4242
_REQUEST, _REPLY = 8, 0
_CLONE_NEWNET = 0x40000000
_TICK = re.compile(rb"^tick (\d+)\r?\n", re.MULTILINE)


def connect_interface(machine: PrivateSystemd, interface: str, address: str = HOST) -> None:
    """Give the host's end of the network its address, once the interface is there."""
    machine.run(["ip", "address", "add", f"{address}/{PREFIX}", "dev", interface])
    machine.run(["ip", "link", "set", interface, "up"])


class Console:
    """The file that a guest writes its console to, read as it grows; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = b""
        self._seen: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Console":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def text(self) -> str:
        """All that the guest has said."""
        return self._text.decode(errors="replace")

    @property
    def numbers(self) -> list[int]:
        """What it has counted: each number once, if nothing was lost or done twice."""
        return [number for _, number in self._seen]

    def longest_gap(self, since: float) -> float:
        """The longest time between two numbers, in seconds, since a time of `time.monotonic`."""
        at = [seen for seen, _ in self._seen if seen >= since]
        return max((b - a for a, b in itertools.pairwise(at)), default=0.0)

    def _read(self) -> None:
        place = 0
        while not self._done.is_set():
            with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
                file.seek(len(self._text))
                self._text += file.read()
            now = time.monotonic()
            for found in _TICK.finditer(self._text, place):
                self._seen.append((now, int(found[1])))
                place = found.end()
            time.sleep(_LOOK)


@dataclass
class Pings:
    """What became of pings: when each was sent and answered (`time.monotonic`), by its number."""

    sent: dict[int, float] = field(default_factory=dict)
    answered: dict[int, float] = field(default_factory=dict)

    def lost(self, since: float = 0.0) -> Sequence[int]:
        """Those that were never answered, of all that were sent since then."""
        return [n for n, at in self.sent.items() if at >= since and n not in self.answered]

    @property
    def longest_gap(self) -> float:
        """The longest time between two answers, in seconds."""
        at = sorted(self.answered.values())
        return max((b - a for a, b in itertools.pairwise(at)), default=float("inf"))


@contextlib.contextmanager
def pinging(
    machine: PrivateSystemd, address: str = GUEST, period: float = PERIOD
) -> Iterator[Pings]:
    """Ping a guest every `period` seconds; wait for late answers at the end."""
    sock = _icmp_socket(machine)
    pings = Pings()
    done = threading.Event()
    values = (sock, address, period, pings, done)
    thread = threading.Thread(target=_ping, args=values, daemon=True)
    with sock:
        thread.start()
        try:
            yield pings
        finally:
            done.set()
            thread.join()


def _icmp_socket(machine: PrivateSystemd) -> socket.socket:
    """One in the network of the machine; raises OSError."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def make() -> None:  # a thread of its own stays in that network
        try:
            with open(f"/proc/{machine.pid}/ns/net") as inner:
                if ctypes.CDLL(None, use_errno=True).setns(inner.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.append(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    for error in failed:
        raise error
    return made[0]


def _ping(
    sock: socket.socket, address: str, period: float, pings: Pings, done: threading.Event
) -> None:
    due, number = time.monotonic(), 0
    until = float("inf")
    while time.monotonic() < until:
        if done.is_set() and until == float("inf"):
            until = time.monotonic() + _LATE
        if not done.is_set() and time.monotonic() >= due:
            number, due = number + 1, due + period
            message = _ECHO.pack(_REQUEST, 0, 0, _OURS, 0, number)
            message = _ECHO.pack(_REQUEST, 0, _checksum(message), _OURS, 0, number)
            pings.sent[number] = time.monotonic()
            sock.sendto(message, (address, 0))
        sock.settimeout(max(due - time.monotonic(), 0.0005))
        with contextlib.suppress(TimeoutError, BlockingIOError):
            data = sock.recv(2000)
            kind, _, _, identifier, _, found = _ECHO.unpack(data[20:32])
            if (kind, identifier) == (_REPLY, _OURS):
                pings.answered.setdefault(found, time.monotonic())


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
