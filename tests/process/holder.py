# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that holds backends of all kinds: `python holder.py '{"face": ..., "bind": ...}'`.

Options: `backends`, by name: a member of MAKERS and its arguments; `drop`; `break`: what its check does
to them; `prepare`: it spoils a device while it prepares itself; `reads`: the name of a pipe that it reads by the loop. Lines: `facts NAME`, `do NAME WHAT` (a function of `Uses`), `hold` (its handler never ends),
`linger` (once the file `go` is there, it reads what it writes to its own pipe).
"""

import array
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import upgrader
from upgrader import backends

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
_SET_HEADER = 0x400454D8  # TUNSETVNETHDRSZ
_CREATED = 0x100  # IN_CREATE
HEARD: list[bytes] = []


class Uses:
    """What a client can have done with a backend; each returns what is seen of it then."""

    maps: dict[int, Any] = {}  # noqa: RUF012 (the one of this process)

    @classmethod
    def add(cls, memory: backends.Memory) -> int:
        region = cls.maps.setdefault(memory.fileno(), memory.map())
        region[0] += 1
        return int(region[0])

    @classmethod
    def seal(cls, memory: backends.Memory) -> int:
        cls.maps.pop(memory.fileno()).close()
        memory.seal()
        return int(memory.map()[0])

    @staticmethod
    def header(tap: backends.Tap) -> int:
        return tap.describe(tap.fileno())["header"]

    @staticmethod
    def append(file: backends.OpenFile) -> int:
        """A line more, under a lock of its own file; which line that is."""
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.write(file.fileno(), b"line\n")
        return place // 5 + 1

    @staticmethod
    def posix(file: backends.OpenFile) -> str:
        fcntl.lockf(file.fileno(), fcntl.LOCK_EX)
        return "locked"

    @staticmethod
    def carry(pipe: backends.Pipe) -> int:
        """What was left in it, and one more is left."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            found = int(os.read(pipe.fds[0], 100))
        os.write(pipe.fds[-1], str(found + 1).encode())
        return found + 1

    @staticmethod
    def heard(pipe: backends.Pipe) -> int:
        """How many lines this process has read of it by a callback of the loop."""
        return len(HEARD)

    @staticmethod
    def count(eventfd: backends.EventFd) -> int:
        found = 0
        with contextlib.suppress(BlockingIOError):
            found = os.eventfd_read(eventfd.fileno())
        os.eventfd_write(eventfd.fileno(), found + 1)
        return found + 1

    @staticmethod
    def expired(timer: backends.TimerFd) -> int:
        select.select([timer.fileno()], [], [])
        return struct.unpack("Q", os.read(timer.fileno(), 8))[0]

    @staticmethod
    def watch(inotify: backends.Inotify) -> int:
        return inotify.watch(OPTIONS["directory"], _CREATED)

    @staticmethod
    def created(inotify: backends.Inotify) -> str:
        """The name of what was created, and where."""
        select.select([inotify.fileno()], [], [])
        data = os.read(inotify.fileno(), 4096)
        number = struct.unpack_from("i", data)[0]
        name = data[16:].split(b"\0")[0].decode()
        return f"{inotify.paths.get(number, '')}/{name}"

    @staticmethod
    def pid(child: backends.Child) -> str:
        return f"{child.pid} {child.ended} {child.exit_code}"

    @staticmethod
    def echo(pty: backends.Pty) -> str:
        """What the terminal echoes."""
        os.write(pty.fileno(), b"x")
        select.select([pty.fileno()], [], [])
        return os.read(pty.fileno(), 10).decode()

    @staticmethod
    def frames(packet: backends.PacketSocket) -> bool:
        """Whether what was sent the last time is there, among what others send; one more is sent."""
        sock, found, own = packet.socket(), False, OPTIONS["directory"].encode()
        with sock, contextlib.suppress(BlockingIOError):
            while frame := sock.recv(2000):
                found = found or own in frame
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(own, ("127.0.0.1", 9))
        return found

    @staticmethod
    def sequence(netlink: backends.NetlinkSocket) -> int:
        netlink.sequence += 1
        return netlink.sequence

    @staticmethod
    def in_flight(unix: backends.UnixSocket) -> str:
        """What is in the file that is under way."""
        select.select([unix.fileno()], [], [])
        with unix.socket() as sock:
            _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        with os.fdopen(array.array("i", fds)[0], "rb") as file:
            return os.pread(file.fileno(), 100, 0).decode()

    @staticmethod
    def number(opaque: backends.Opaque) -> int:
        return os.fstat(opaque.fileno()).st_ino


def epoll() -> int:
    with select.epoll() as made:
        return os.dup(made.fileno())


MAKERS: dict[str, Callable[..., Any]] = {
    "child": backends.Child,
    "eventfd": backends.EventFd,
    "file": backends.OpenFile,
    "inotify": backends.Inotify,
    "memory": backends.Memory,
    "netlink": backends.NetlinkSocket,
    "epoll": lambda: backends.Opaque(epoll),
    "namespace": lambda: backends.Opaque(lambda: os.open("/proc/self/ns/net", os.O_RDONLY)),
    "packet": backends.PacketSocket,
    "pipe": backends.Pipe,
    "pty": backends.Pty,
    "tap": backends.Tap,
    "timerfd": backends.TimerFd,
    "unix": backends.UnixSocket,
}


def disturb(held: dict[str, Any]) -> None:
    """What another program does to a device that it takes for its own, and then it fails."""
    match OPTIONS.get("break"):
        case "header":
            fcntl.ioctl(held["tap"].fileno(), _SET_HEADER, struct.pack("i", 10))
            raise ValueError("as told")
        case "refuse":
            raise ValueError("as told")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)


def answer(line: str, held: dict[str, Any]) -> bytes:
    command, name, *what = line.split(" ")
    backend = held[name]
    if command == "facts":
        return json.dumps([backend.describe(fd) for fd in backend.fds]).encode() + b"\n"
    return str(getattr(Uses, what[0])(backend)).encode() + b"\n"


def declare(instance: Any) -> tuple[Any, dict[str, Any]]:
    listener = instance.listener("chat", bind=OPTIONS["bind"])
    held = {
        name: instance.backend(name, MAKERS[kind](*positional, **named))
        for name, (kind, positional, named) in OPTIONS.get("backends", {}).items()
    }
    for name in OPTIONS.get("drop", []):
        instance.drop(name)

    if OPTIONS.get("prepare"):

        @instance.prepare
        def spoil() -> None:
            """What a program does that is started on the device; the source serves on, and undoes it."""
            tap = held["tap"]
            fcntl.ioctl(tap.fileno(), _SET_HEADER, struct.pack("i", 10))
            deadline = time.monotonic() + 10
            while tap.describe(tap.fileno())["header"] != 12:
                if time.monotonic() > deadline:
                    raise ValueError("nobody guards the device")
                time.sleep(0.001)

    @instance.verify
    def check() -> None:
        disturb(held)

    return listener, held


async def run_aio() -> None:
    async with upgrader.attach("holder") as instance:
        listener, held = declare(instance)

        async def talk(peer: Any) -> None:
            async for line in peer.lines():
                if line == b"hold":
                    await peer.write(b"holding\n")
                    await asyncio.sleep(3600)
                if line == b"linger":
                    await peer.write(b"holding\n")
                    while not os.path.exists(OPTIONS["go"]):
                        await asyncio.sleep(0.001)
                    os.write(held["jobs"].fds[1], b"one\n")
                    while not HEARD:
                        await asyncio.sleep(0.001)
                await peer.write(answer(line.decode(), held) if b" " in line else b"heard\n")

        async def read() -> None:
            pipe = held[OPTIONS["reads"]]
            number = pipe.fileno()
            asyncio.get_running_loop().add_reader(
                number, lambda: HEARD.extend(os.read(number, 65536).splitlines())
            )

        instance.connections(listener, drains=True)(talk)
        await instance.serve([read] if "reads" in OPTIONS else [])


def run_blocking() -> None:
    with upgrader.attach("holder") as instance:
        listener, held = declare(instance)

        def talk(peer: Any) -> None:
            for line in peer.lines():
                peer.write(answer(line.decode(), held))

        instance.connections(listener)(talk)
        for _ in instance.serve():
            pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(run_aio()) if OPTIONS["face"] == "aio" else run_blocking()
