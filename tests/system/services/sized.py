# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers each line with how many came on its connection, the generation, and a checksum of what it
holds: a state of STATE_MB megabytes, and memory of MEMORY_MB. LAZY: as `lazy` of `connections`."""

import asyncio
import os
import zlib
from dataclasses import dataclass, field

import upgrader
from upgrader.backends import Memory

PAGE = 4096
STATE, MEMORY = (int(os.environ.get(name, "0")) << 20 for name in ("STATE_MB", "MEMORY_MB"))


@dataclass
class Row:
    number: int
    text: str


@upgrader.state("rows")
class Rows:
    rows: dict[str, Row] = field(default_factory=dict)


@upgrader.state("lines")
class Lines:
    count: int = 0


async def main() -> None:
    async with upgrader.attach("sized") as instance:
        instance.state(Rows)
        memory = instance.backend("memory", Memory(MEMORY)) if MEMORY else None
        listener = instance.listener("door", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(listener, state=Lines, lazy="LAZY" in os.environ)
        async def answer(peer: upgrader.Peer[Lines], rows: Rows) -> None:
            async for line in peer.lines():
                peer.state.count += 1
                if line == b"fill":
                    rows.rows = {str(n): Row(n, "x" * 1000) for n in range(STATE >> 10)}
                held = zlib.crc32(repr([len(rows.rows), *list(rows.rows.values())[-1:]]).encode())
                if memory:
                    with memory.map() as pages:
                        for place in range(0, MEMORY, PAGE) if line == b"fill" else ():
                            pages[place] = place // PAGE % 251
                        held = zlib.crc32(pages[MEMORY - PAGE :], held)
                await peer.write(b"%d %d %d\n" % (peer.state.count, instance.generation, held))

        await instance.serve()


asyncio.run(main())
