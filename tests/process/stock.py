# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table that changes while it is served: `python stock.py '{"bind": ..., "bytes": 5000000}'`.

It begins with `bytes` in items of a kilobyte, and `rate` bytes a second of them are written anew, every
two milliseconds. `check` says whether all that was ever written is there: "ok", or what is wrong;
`size` how many items there are, `write N` writes N of them. If it is `blocking`, it is no asyncio program,
and nothing else writes. Version 2 has one field more in each item. If it `refuses`, its check
fails; if a `way` is given, version 2 goes it when it has loaded item number `at`: it "dies", "raises" or
"waits" for ever, and makes the file `mark`. When its task ends, it writes to `late`, as JSON, when it was
due and how late that was.
"""

import asyncio
import itertools
import json
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

import upgrader

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
VERSION: int = OPTIONS.get("version", 1)
SIZE = 1000
TICK = 0.002
TEXT = "x" * (SIZE - 30)
KEYS: int = OPTIONS["bytes"] // SIZE
CHOOSE = random.Random(7)

loaded = itertools.count(1)


def go_wrong(way: str) -> None:
    if way == "dies":
        os._exit(9)
    if way == "raises":
        raise ValueError("not with me")
    Path(OPTIONS["mark"]).touch()
    while True:
        time.sleep(1)


if VERSION == 1:

    class Item(msgspec.Struct, frozen=True, gc=False):
        number: int
        text: str

    def make(number: int) -> Any:
        return Item(number, TEXT)
else:

    @dataclass(frozen=True)
    class Item:  # type: ignore[no-redef]
        number: int
        text: str
        note: str = upgrader.since(2, default="none")

        def __post_init__(self) -> None:
            if "way" in OPTIONS and next(loaded) == OPTIONS["at"]:
                go_wrong(OPTIONS["way"])

    def make(number: int) -> Any:
        return Item(number, TEXT)


@upgrader.state("stock", version=VERSION, readable_from=1)
class Stock:
    written: int = 0
    mark: int = 0
    items: upgrader.Table[str, Item] = field(default_factory=upgrader.Table)

    def write(self, key: str) -> None:
        """Set an item, or take it away, and note what must be there now."""
        old = self.items.get(key)
        if old is not None:
            self.mark ^= mark(key, old)
        self.written += 1
        if old is not None and self.written % 50 == 0:
            del self.items[key]
            return
        self.items[key] = new = make(self.written)
        self.mark ^= mark(key, new)

    def answer(self, line: bytes) -> bytes:
        """What a client gets."""
        word, _, number = line.partition(b" ")
        for _ in range(int(number or 0)):
            self.write(f"key {CHOOSE.randrange(KEYS + KEYS // 10)}")
        return f"{self.check() if word == b'check' else len(self.items)}\n".encode()

    def check(self) -> str:
        found = 0
        for key, item in self.items.items():
            found ^= mark(key, item)
        kind = type(self.items).__name__
        return "ok" if (found, kind) == (self.mark, "Table") else f"{found} {self.mark} {kind}"


def mark(key: str, item: Item) -> int:
    return zlib.crc32(f"{key}:{item.number}:{len(item.text)}".encode())


async def main() -> None:
    async with upgrader.attach("stock", version=str(VERSION)) as instance:
        instance.state(Stock)
        listener = instance.listener("questions", bind=OPTIONS["bind"])
        late: list[tuple[float, float]] = []

        @instance.verify
        def verify(stock: Stock) -> None:
            if OPTIONS.get("refuses"):
                raise upgrader.VerifyError("not with me")

        @instance.connections(listener)
        async def answer(peer: upgrader.Peer[None], stock: Stock) -> None:
            async for line in peer.lines():
                await peer.write(stock.answer(line))

        async def fill(stock: Stock) -> None:
            if not stock.items:
                for number in range(KEYS):
                    stock.write(f"key {number}")
            due, owed = time.monotonic(), 0.0
            try:
                while True:
                    due += TICK
                    await asyncio.sleep(max(due - time.monotonic(), 0))
                    late.append((due, time.monotonic() - due))
                    owed += OPTIONS.get("rate", 0) * TICK / SIZE
                    while owed >= 1:
                        stock.write(f"key {CHOOSE.randrange(KEYS + KEYS // 10)}")
                        owed -= 1
            finally:
                if "late" in OPTIONS:
                    Path(OPTIONS["late"]).write_text(json.dumps(late))

        await instance.serve(tasks=[fill])


def main_without_asyncio() -> None:
    with upgrader.attach("stock", version=str(VERSION)) as instance:
        instance.state(Stock)

        @instance.connections(instance.listener("questions", bind=OPTIONS["bind"]))
        def answer(peer: upgrader.blocking.Peer[None], stock: Stock) -> None:
            for line in peer.lines():
                peer.write(stock.answer(line))

        for _ in instance.serve():
            pass


if OPTIONS.get("blocking"):
    main_without_asyncio()
else:
    asyncio.run(main())
