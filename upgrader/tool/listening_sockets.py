# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find in /proc which sockets the processes of a unit listen on.

Layouts of /proc/PID/net/tcp, udp and unix: proc_pid_net(5), and net/ipv4/tcp_ipv4.c of Linux.
"""

import contextlib
import ipaddress
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TCP_LISTEN = "0A"
_UDP_UNCONNECTED = "07"
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON of a UNIX socket
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True)
class Listening:
    """A socket that takes what comes from outside: a listener, or a bound UDP socket."""

    inode: int
    kind: str
    address: str

    def __str__(self) -> str:
        return f"{self.kind} {self.address}"


def processes(control_group: str) -> list[int]:
    """The processes in a cgroup and below it; none where there is no cgroup2."""
    root = Path("/sys/fs/cgroup", control_group.lstrip("/"))
    found: list[int] = []
    for path in (root / "cgroup.procs", *root.rglob("*/cgroup.procs")):
        with contextlib.suppress(OSError, ValueError):
            found += map(int, path.read_text().split())
    return sorted(set(found))


def inodes(pid: int) -> set[int]:
    """The inodes of all sockets that a process has; raises OSError if it may not be looked at."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if match := _SOCKET.fullmatch(os.readlink(f"/proc/{pid}/fd/{name}")):
                found.add(int(match[1]))
    return found


def listening(pid: int) -> dict[int, Listening]:
    """The listening sockets of the network namespace that a process is in, by inode."""
    found: dict[int, Listening] = {}
    for each in (*_inet(pid, "tcp"), *_inet(pid, "udp"), *_unix(pid)):
        found[each.inode] = each
    return found


def _inet(pid: int, kind: str) -> Iterator[Listening]:
    state = {"tcp": _TCP_LISTEN, "udp": _UDP_UNCONNECTED}[kind]
    for suffix in ("", "6"):
        for fields in _rows(pid, kind + suffix):
            host, _, port = fields[1].partition(":")
            # A UDP socket with a port of the kernel's choice asks, and is not asked.
            if fields[3] == state and not (kind == "udp" and int(port, 16) in _ephemeral()):
                yield Listening(int(fields[9]), kind.upper(), f"{_host(host)}:{int(port, 16)}")


def _unix(pid: int) -> Iterator[Listening]:
    for fields in _rows(pid, "unix"):
        if int(fields[3], 16) & _ACCEPTS:
            yield Listening(int(fields[6]), "UNIX", fields[7] if len(fields) > 7 else "(no name)")


def _rows(pid: int, table: str) -> Iterator[list[str]]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/net/{table}").read_text(errors="replace")
        for line in text.splitlines()[1:]:
            yield line.split(None, 7) if table == "unix" else line.split()


def _host(text: str) -> str:
    """An address as the kernel prints it there: words of 32 bits, in the byte order of the machine."""
    data = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    address = ipaddress.ip_address(data)
    return f"[{address}]" if address.version == 6 else str(address)


def _ephemeral() -> range:
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, _PORTS.read_text().split())
        return range(low, high + 1)
    return range(0)
