# SPDX-License-Identifier: LGPL-2.1-or-later
"""A store of keys and values in two versions, as VERSION says: 2 counts under another name.

Commands are lines: `set K V`, `get K`, `count`, `task K` (a value that cannot be saved), `drop K`.
"""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import upgrader

VERSION = int(os.environ.get("VERSION", "2"))


@dataclass
class Value:
    text: str = ""
    more: Any = None


@dataclass
class Noted(Value):
    note: str = upgrader.since(2, default="none")


if VERSION == 1:

    @upgrader.state("store")
    class Store:
        commands: int = 0
        values: dict[str, Value] = field(default_factory=dict)

else:

    @upgrader.state("store", version=2, readable_from=1)
    class Store:  # type: ignore[no-redef]
        executed: int = 0
        values: dict[str, Noted] = field(default_factory=dict)

    @upgrader.convert(Store, 1)
    def from_1(fields: dict[str, Any]) -> dict[str, Any]:
        fields["executed"] = fields.pop("commands")
        return fields

    @upgrader.convert_back(Store, 1)
    def to_1(fields: dict[str, Any]) -> dict[str, Any]:
        fields["commands"] = fields.pop("executed")
        return fields


def answer(store: Any, line: str) -> str:
    counter = "commands" if VERSION == 1 else "executed"
    setattr(store, counter, getattr(store, counter) + 1)
    match line.split():
        case ["set", key, text]:
            store.values[key] = Value(text) if VERSION == 1 else Noted(text)
        case ["get", key]:
            return store.values[key].text if key in store.values else "nil"
        case ["task", key]:
            store.values[key] = Value(more=asyncio.current_task())
        case ["drop", key]:
            del store.values[key]
        case ["count"]:
            return str(getattr(store, counter))
    return "OK"


async def main() -> None:
    async with upgrader.attach("store", version=str(VERSION)) as instance:
        instance.state(Store)
        listener = instance.listener("store", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(listener)
        async def talk(peer: Any, store: Store) -> None:
            async for line in peer.lines():
                await peer.write(answer(store, line.decode()).encode() + b"\n")

        await instance.serve()


asyncio.run(main())
