# SPDX-License-Identifier: LGPL-2.1-or-later
"""A store of keys and values in two versions: `python kv.py '{"bind": ..., "version": 2}'`.

Commands are lines: `set K V`, `get K`, `count`, `task K` (a value that cannot be saved), `drop K`, `half` (of what version 1 counts),
`slow K V` and `turn K V` (set after a second, within a turn), `subscribe`, `publish TEXT`.
Version 2 counts under another name and keeps notes. If it `refuses`, its check fails; it `waits` (MARK, GO) before it serves. `without` names what a careless author forgot, and `odd` begins with a value that cannot be saved.
"""

import asyncio
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import upgrader

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
VERSION: int = OPTIONS.get("version", 1)
WITHOUT: str = OPTIONS.get("without", "")


@dataclass
class Value:
    text: str = ""
    more: Any = print if OPTIONS.get("odd") else None


def first() -> dict[str, Any]:
    return {"first": Value()} if OPTIONS.get("odd") else {}


@dataclass
class Noted(Value):
    note: str = "none" if WITHOUT == "since" else upgrader.since(2, default="none")


if VERSION == 1:

    @upgrader.state("kv", version=1)
    class Store:
        commands: int = 0
        values: dict[str, Value] = field(default_factory=first)

        def count(self) -> int:
            self.commands += 1
            return self.commands

else:

    @upgrader.state("kv", version=2, readable_from=1)
    class Store:  # type: ignore[no-redef]
        executed: int = 0
        values: dict[str, Noted] = field(default_factory=dict)

        def count(self) -> int:
            self.executed += 1
            return self.executed

    @upgrader.convert(Store, 1)
    def from_1(fields: dict[str, Any]) -> dict[str, Any]:
        fields["executed"] = fields.pop("commands")
        return fields

    if WITHOUT != "convert_back":

        @upgrader.convert_back(Store, 1)
        def to_1(fields: dict[str, Any]) -> dict[str, Any]:
            fields["commands"] = fields.pop("executed")
            return fields


@upgrader.state("lines")
class Lines:
    read: int = 0


@upgrader.state("subscriber")
class Subscriber:
    subscribed: bool = False


def answer(store: Any, line: str) -> str:
    command, *words = line.split()
    number = store.count()
    match command, words:
        case "set", [key, text]:
            store.values[key] = Value(text) if VERSION == 1 else Noted(text)
        case "get", [key]:
            return store.values[key].text if key in store.values else "nil"
        case "task", [key]:
            store.values[key] = Noted(more=asyncio.current_task())
        case "drop", [key]:
            del store.values[key]
        case "half", []:
            store.commands += 0.5
        case "count", []:
            return str(number)
    return "OK"


async def main() -> None:
    async with upgrader.attach("kv", version=str(VERSION)) as instance:
        instance.state(Store)
        instance.state(Lines)
        door = instance.listener("kv", bind=OPTIONS["bind"])

        @instance.verify
        async def check() -> None:
            if OPTIONS.get("refuses"):
                raise upgrader.VerifyError("not with me")

        subscribers: set[Any] = set()

        @instance.connections(door, state=Subscriber)
        async def talk(peer: Any, store: Store, lines: Lines) -> None:
            if peer.state.subscribed:
                subscribers.add(peer)
            async for line in peer.lines():
                lines.read += 1
                if line == b"lines":
                    await peer.write(b"%d\n" % lines.read)
                    continue
                match line.decode().split():
                    case ["subscribe"]:
                        peer.state.subscribed = True
                        subscribers.add(peer)
                    case ["publish", text]:
                        for each in subscribers:
                            await each.write(f"{text}\n".encode())
                        await peer.write(b"%d\n" % len(subscribers))
                        continue
                    case ["slow", key, text]:
                        await asyncio.sleep(1)
                        store.values[key] = Value(text)
                    case ["turn", key, text]:
                        async with instance.turn():
                            await asyncio.sleep(1)
                            store.values[key] = Value(text)
                await peer.write(answer(store, line.decode()).encode() + b"\n")

        if waits := OPTIONS.get("waits"):
            mark, go = map(Path, waits)
            mark.touch()
            while not go.exists():
                await asyncio.sleep(0.01)
        await instance.serve()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
