# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that knows nothing of upgrader: it takes LISTEN_FDS, says READY=1, and ends after what it is
at when it gets SIGTERM. Answers lines: `who` with its PID; between `begin` and `end` it is at
something; at `again` it starts another one as its main process.

FLAW: exit (before it is ready), hang (never ready), blocking (flips O_NONBLOCK), shuts (its first socket,
at its end), long (asks for more time to start), tells (that it ends, and fails unless it can).
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys

FLAW = os.environ.get("FLAW", "")


def facts() -> dict[str, object]:
    """What it was started with."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    with open("/proc/self/environ", "rb") as raw:
        items = raw.read().split(b"\0")
    return {
        "environment": dict(os.fsdecode(item).partition("=")[::2] for item in items if item),
        "signals": {name: status[name] for name in ("SigBlk", "SigIgn", "SigCgt")},
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "session": os.getsid(0) == os.getpid(),
        "oom": open("/proc/self/oom_score_adj").read().strip(),
        "fds": sorted(os.readlink(f"/proc/self/fd/{n}") for n in range(3, 3 + COUNT)),
    }


COUNT = int(os.environ.get("LISTEN_FDS", "0"))
FACTS = facts() if __name__ == "__main__" else {}
busy: set[asyncio.Task[None]] = set()


def notify(text: str) -> None:
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(text.encode())


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    task = asyncio.current_task()
    assert task
    busy.add(task)  # what was accepted is answered
    working = False
    while line := await reader.readline():
        match line.split():
            case [b"who"]:
                writer.write(b"%d\n" % os.getpid())
            case [b"facts"]:
                writer.write(json.dumps(FACTS).encode() + b"\n")
            case [b"again"]:
                if os.fork() == 0:
                    os.environ["LISTEN_PID"] = str(os.getpid())
                    os.execv(sys.executable, [sys.executable, *sys.argv])
                writer.write(b"started\n")
            case [b"begin"]:
                working = True
                writer.write(b"begun\n")
            case [b"end"]:
                working = False
                writer.write(b"ended\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        if working:
            busy.add(task)
        else:
            busy.discard(task)
    busy.discard(task)
    writer.close()


def echo(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):  # the other one was quicker
        data, sender = sock.recvfrom(100)
        sock.sendto(data + b" %d" % os.getpid(), sender)


async def main() -> None:
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    sockets = [socket.socket(fileno=3 + number) for number in range(COUNT)]
    datagrams = [sock for sock in sockets if sock.type == socket.SOCK_DGRAM]
    sockets = [sock for sock in sockets if sock.type == socket.SOCK_STREAM]
    servers = [await asyncio.start_server(answer, sock=sock.dup()) for sock in sockets]
    if FLAW == "blocking":
        sockets[0].setblocking(True)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in datagrams:
        loop.add_reader(each, echo, each)
    loop.add_signal_handler(signal.SIGTERM, over.set)
    loop.add_signal_handler(signal.SIGHUP, notify, f"RELOADING=1\nSTATUS=reloaded by {os.getpid()}")
    if FLAW == "long":
        notify("EXTEND_TIMEOUT_USEC=30000000\nSTATUS=reads a lot")
    if FLAW != "hang":
        notify(f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}")
    await over.wait()
    if FLAW == "tells":
        notify("STOPPING=1")
    if FLAW == "shuts":
        sockets[0].shutdown(socket.SHUT_RDWR)
    for each in datagrams:
        loop.remove_reader(each)
    for server in servers:
        server.close()
    await asyncio.sleep(0.05)  # what was accepted last has got its task by then
    while busy:
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    if FLAW == "exit":
        sys.exit(3)
    asyncio.run(main())
