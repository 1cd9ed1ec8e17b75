# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures that are measured, not asserted: `make bench`. Each is a ratio to a baseline of the same run."""

import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from upgrader.testing import Service

ROUNDS = 15
CONNECTIONS = 5000

SERVER = """
import asyncio, sys, upgrader

@upgrader.state("session")
class Session:
    lines: int = 0

async def main():
    async with upgrader.attach("bench") as instance:
        door = instance.listener("bench", bind="unix:" + sys.argv[1])

        @instance.connections(door, state=Session)
        async def talk(peer: upgrader.Peer[Session]):
            async for line in peer.lines():
                peer.state.lines += 1
                await peer.write(b"%d\\n" % peer.state.lines)

        await instance.serve()

asyncio.run(main())
"""


def milliseconds(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median duration of an action."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def python(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def test_import() -> None:
    """`import upgrader` on top of a bare interpreter."""
    bare = milliseconds(python("pass"))
    core = milliseconds(python("import upgrader"))
    aio = milliseconds(python("import upgrader.aio"))
    only_asyncio = milliseconds(python("import asyncio"))
    print(
        f"\nbare interpreter {bare:.0f} ms; import upgrader +{core - bare:.0f} ms"
        f" ({core / bare:.1f} times); import asyncio +{only_asyncio - bare:.0f} ms,"
        f" both +{aio - bare:.0f} ms"
    )


def test_restart(tmp_path: Path) -> None:
    """A restart with thousands of connections, against one with none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    path = str(tmp_path / "door")
    command = [sys.executable, str(program), path]

    def clients() -> Sequence[socket.socket]:
        found = []
        for _ in range(CONNECTIONS):
            found.append(socket.socket(socket.AF_UNIX))
            found[-1].connect(path)
        return found

    with Service() as service:
        service.start(command)
        none = milliseconds(lambda: service.upgrade(command), 5)
        opened = clients()
        many = milliseconds(lambda: service.upgrade(command), 5)
        for client in opened:
            client.sendall(b"x\n")
        assert all(client.recv(10) == b"1\n" for client in opened)
        for client in opened:
            client.close()
    print(
        f"\nrestart with no connection {none:.0f} ms, with {CONNECTIONS}: {many:.0f} ms"
        f" ({many / none:.1f} times)"
    )
