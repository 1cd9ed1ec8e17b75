# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that holds backends of all kinds: `python holder.py '{"face": ..., "bind": ...}'`.

Options: `backends`, by name: a member of `Kinds` and its arguments; `break`: what its check does to
them. Lines: `facts NAME`, `do NAME WHAT` (a method of `Uses`), `hold` (its handler never ends).
"""

import asyncio
import fcntl
import json
import logging
import struct
import sys
from typing import Any

import upgrader
from upgrader.backends import Memory, Tap

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
_SET_HEADER = 0x400454D8  # TUNSETVNETHDRSZ
MAKERS: dict[str, Any] = {"memory": Memory, "tap": Tap}
#: What the maps of memory are kept by, while this process lives.
MAPS: dict[str, Any] = {}


class Uses:
    """What a client can have done with a backend; each returns what is seen of it then."""

    @staticmethod
    def add(name: str, memory: Any) -> str:
        region = MAPS.setdefault(name, memory.map())
        region[0] += 1
        return str(region[0])

    @staticmethod
    def seal(name: str, memory: Any) -> str:
        MAPS.pop(name).close()
        memory.seal()
        return str(memory.map()[0])

    @staticmethod
    def header(name: str, tap: Any) -> str:
        return str(tap.describe(tap.fileno())["header"])


def disturb(backends: dict[str, Any]) -> None:
    """What another program does to a device that it takes for its own, and then it fails."""
    match OPTIONS.get("break"):
        case "header":
            fcntl.ioctl(backends["tap"].fileno(), _SET_HEADER, struct.pack("i", 10))
            raise ValueError("as told")


def answer(line: str, backends: dict[str, Any]) -> bytes:
    command, name, *what = line.split(" ")
    backend = backends[name]
    if command == "facts":
        return json.dumps(backend.describe(backend.fileno())).encode() + b"\n"
    return str(getattr(Uses, what[0])(name, backend)).encode() + b"\n"


def declare(instance: Any) -> tuple[Any, dict[str, Any]]:
    listener = instance.listener("chat", bind=OPTIONS["bind"])
    backends = {
        name: instance.backend(name, MAKERS[kind](*positional, **named))
        for name, (kind, positional, named) in OPTIONS.get("backends", {}).items()
    }
    for name in OPTIONS.get("drop", []):
        instance.drop(name)

    @instance.verify
    def check() -> None:
        disturb(backends)

    return listener, backends


async def run_aio() -> None:
    async with upgrader.attach("holder") as instance:
        listener, backends = declare(instance)

        async def talk(peer: Any) -> None:
            async for line in peer.lines():
                if line == b"hold":
                    await peer.write(b"holding\n")
                    await asyncio.sleep(3600)
                await peer.write(answer(line.decode(), backends))

        instance.connections(listener, drains=True)(talk)
        await instance.serve()


def run_blocking() -> None:
    with upgrader.attach("holder") as instance:
        listener, backends = declare(instance)

        def talk(peer: Any) -> None:
            for line in peer.lines():
                peer.write(answer(line.decode(), backends))

        instance.connections(listener)(talk)
        for _ in instance.serve():
            pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(run_aio()) if OPTIONS["face"] == "aio" else run_blocking()
