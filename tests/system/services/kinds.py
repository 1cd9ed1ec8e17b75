# SPDX-License-Identifier: LGPL-2.1-or-later
"""With BACKENDS it holds some of every sort that systemd has to tell apart, and counts in each of them;
without, it has what version 0.1.0 of the library has."""

import contextlib
import mmap
import os
import struct
from typing import Any

import upgrader

DEVICE = "kinds0"


class Held:
    """What is counted in: memory, two eventfds, a pipe, a timer, and a device that may be there once."""

    def __init__(self, instance: Any) -> None:
        from upgrader.backends import EventFd, Memory, Pipe, Tap, TimerFd

        self.memory = instance.backend("memory", Memory(4096))
        self.events = [instance.backend(f"events{number}", EventFd()) for number in (1, 2)]
        self.pipe = instance.backend("pipe", Pipe())
        self.timer = instance.backend("timer", TimerFd(0.001))
        self.tap = instance.backend("tap", Tap(DEVICE, header=12))
        self.worker = instance.child("worker", ["sleep", "1000"])
        self.region: mmap.mmap | None = None

    def count(self) -> list[int]:
        """One more in each; what was there, then whether the timer has expired, and the vnet header."""
        self.region = region = self.region or self.memory.map()
        region[0] += 1
        counts = [region[0]]
        for number, events in enumerate(self.events, 1):
            found = 0
            with contextlib.suppress(BlockingIOError):
                found = os.eventfd_read(events.fileno())
            os.eventfd_write(events.fileno(), found + number)
            counts.append(found + number)
        found = 0
        with contextlib.suppress(BlockingIOError):
            found = int(os.read(self.pipe.fds[0], 100))
        os.write(self.pipe.fds[1], str(found + 1).encode())
        expired = struct.unpack("Q", os.read(self.timer.fileno(), 8))[0] > 0
        return [*counts, found + 1, int(expired), self.tap.describe(self.tap.fileno())["header"]]


with upgrader.attach("kinds") as instance:
    held = Held(instance) if os.environ.get("BACKENDS") else None
    listener = instance.listener("door", bind=f"127.0.0.1:{os.environ['PORT']}")

    @instance.connections(listener)
    def answer(peer: Any) -> None:
        for line in peer.lines():
            told = str(held.worker.pid) if line == b"worker" and held else ""
            told = told or " ".join(map(str, held.count() if held else []))
            peer.write(told.encode() + b"\n")

    for _ in instance.serve():
        pass
