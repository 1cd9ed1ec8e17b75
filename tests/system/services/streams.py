# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program written against StreamReader and StreamWriter: one call is all that it has changed."""

import asyncio
import os

import upgrader
import upgrader.aio

ROUND = os.environ.get("ROUND", "0").encode()


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        await asyncio.sleep(0.002)
        writer.write(ROUND + b" " + line)
        await writer.drain()
    writer.close()


async def main() -> None:
    async with upgrader.attach("streams", version=ROUND.decode()):
        port = int(os.environ["PORT"])
        server = await upgrader.aio.start_server(handle, "127.0.0.1", port, stateless=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
