# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that prepares itself: `preparing.py FACE VERSION SOCKET PLACE`. It writes to PLACE what it
has seen; version "bad" refuses itself when it has prepared, "slow" takes for ever."""

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import upgrader
from upgrader.protocol.fd import Fd
from upgrader.systemd.listen_fds import Passed

FACE, VERSION, SOCKET, PLACE = sys.argv[1:]


def note(text: str) -> None:
    with open(PLACE, "a") as file:
        file.write(text + "\n")


def declare(instance: Any) -> None:
    listener = instance.listener("main", bind=f"unix:{SOCKET}")

    def prepared() -> None:
        there = sorted(os.readlink(f"/proc/self/fd/{i.fd.fileno()}") for i in instance.passed)
        note(f"{VERSION} prepares at {listener.socket.getsockname()} with {there}")
        with Fd(os.memfd_create(VERSION)) as memfd:
            instance.keep(f"of-{VERSION}", memfd)
        if VERSION == "bad":
            raise ValueError("not with me")

    if FACE == "aio":

        @instance.prepare
        async def prepare() -> None:
            try:
                prepared()
                while VERSION == "slow":
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                note("slow is cancelled")
                raise

    else:
        instance.prepare(prepared)

    @instance.refused
    def over(items: Sequence[Passed]) -> None:
        note(f"{VERSION} sees that nothing came of {[item.name for item in items]}")

    @instance.verify
    def verify() -> None:
        note(f"{VERSION} has {sorted(item.name for item in instance.passed)}")


def blocking() -> None:
    with upgrader.attach("preparing") as instance:
        declare(instance)
        for _ in instance.serve():
            pass


async def on_asyncio() -> None:
    async with upgrader.attach("preparing") as instance:
        declare(instance)
        await instance.serve()


if __name__ == "__main__":
    if FACE == "aio":
        asyncio.run(on_asyncio())
    else:
        blocking()
