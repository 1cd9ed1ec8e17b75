# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys with times to live, and channels with subscribers, in two versions (VERSION) whose states differ.

With REFUSE it refuses to take over.

Commands are lines: `SET K V`, `SLOWSET K V` (within a turn of some milliseconds), `INCR K`, `GET K`,
`EXPIRE K MS`, `COUNT` (of keys), `SUBSCRIBE CHANNEL`, `PUBLISH CHANNEL TEXT` (answers with how many it
reached), `PING`, `VERSION`. Subscribers get `CHANNEL NUMBER TEXT`; on the channel `expired` the texts
are `KEY DUE NOW`, in seconds since the epoch.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import Any

import upgrader

VERSION = os.environ.get("VERSION", "1")
#: Bytes that a subscriber may be behind: more than any test publishes.
LIMIT = 48 << 20


@dataclass
class Entry:
    text: str = ""
    due: float | None = None  # seconds since the epoch


if VERSION == "1":

    @upgrader.state("cache")
    class Cache:
        values: dict[str, str] = field(default_factory=dict)
        due: dict[str, float] = field(default_factory=dict)
        news: dict[str, int] = field(default_factory=dict)

        def get(self, key: str) -> str | None:
            return self.values.get(key)

        def set(self, key: str, text: str) -> None:
            self.values[key] = text
            self.due.pop(key, None)

        def expire(self, key: str, due: float) -> None:
            self.due[key] = due

        def take_due(self, now: float) -> list[tuple[float, str]]:
            """Remove what has lived for long enough; returns it, the oldest first."""
            found = sorted((due, key) for key, due in self.due.items() if due <= now)
            for _, key in found:
                del self.due[key], self.values[key]
            return found

        def __len__(self) -> int:
            return len(self.values)

    @upgrader.state("client")
    class Client:
        channels: list[str] = field(default_factory=list)

        def subscribe(self, channel: str) -> None:
            self.channels.append(channel)

else:

    @upgrader.state("cache", version=2, readable_from=1)
    class Cache:  # type: ignore[no-redef]
        entries: dict[str, Entry] = field(default_factory=dict)
        news: dict[str, int] = field(default_factory=dict)

        def get(self, key: str) -> str | None:
            return self.entries[key].text if key in self.entries else None

        def set(self, key: str, text: str) -> None:
            self.entries[key] = Entry(text)

        def expire(self, key: str, due: float) -> None:
            self.entries[key].due = due

        def take_due(self, now: float) -> list[tuple[float, str]]:
            """Remove what has lived for long enough; returns it, the oldest first."""
            items = self.entries.items()
            found = sorted((each.due, key) for key, each in items if each.due and each.due <= now)
            for _, key in found:
                del self.entries[key]
            return found

        def __len__(self) -> int:
            return len(self.entries)

    @upgrader.convert(Cache, 1)
    def cache_from_1(fields: dict[str, Any]) -> dict[str, Any]:
        due = fields["due"]
        entries = {k: {"text": text, "due": due.get(k)} for k, text in fields["values"].items()}
        return {"entries": entries, "news": fields["news"]}

    @upgrader.convert_back(Cache, 1)
    def cache_to_1(fields: dict[str, Any]) -> dict[str, Any]:
        entries = fields["entries"].items()
        return {
            "values": {key: entry["text"] for key, entry in entries},
            "due": {key: entry["due"] for key, entry in entries if entry["due"]},
            "news": fields["news"],
        }

    @upgrader.state("client", version=2, readable_from=1)
    class Client:  # type: ignore[no-redef]
        channels: dict[str, float] = field(default_factory=dict)  # since when

        def subscribe(self, channel: str) -> None:
            self.channels[channel] = time.time()

    @upgrader.convert(Client, 1)
    def client_from_1(fields: dict[str, Any]) -> dict[str, Any]:
        return {"channels": dict.fromkeys(fields["channels"], 0.0)}

    @upgrader.convert_back(Client, 1)
    def client_to_1(fields: dict[str, Any]) -> dict[str, Any]:
        return {"channels": list(fields["channels"])}


async def main() -> None:
    async with upgrader.attach("cache", version=VERSION) as instance:
        instance.state(Cache)
        listener = instance.listener("cache", bind=f"127.0.0.1:{os.environ['PORT']}")

        def publish(cache: Cache, channel: str, text: str) -> int:
            """Tell all subscribers; returns how many."""
            number = cache.news[channel] = cache.news.get(channel, 0) + 1
            subscribers = [each for each in instance.peers if channel in each.state.channels]
            news = f"{channel} {number} {text}\n".encode()
            missed = instance.peers.broadcast(
                news, to=lambda each: channel in each.state.channels, limit=LIMIT
            )
            return len(subscribers) - len(missed)

        async def answer(peer: upgrader.Peer[Client], cache: Cache, line: str) -> object:
            match line.split():
                case ["SET", key, text]:
                    cache.set(key, text)
                case ["SLOWSET", key, text]:
                    async with instance.turn():
                        await asyncio.sleep(0.005)
                        cache.set(key, text)
                case ["INCR", key]:
                    text = str(int(cache.get(key) or 0) + 1)
                    cache.set(key, text)
                    return text
                case ["GET", key]:
                    return cache.get(key) or "nil"
                case ["EXPIRE", key, milliseconds]:
                    cache.expire(key, time.time() + int(milliseconds) / 1000)
                case ["COUNT"]:
                    return len(cache)
                case ["SUBSCRIBE", channel]:
                    peer.state.subscribe(channel)
                case ["PUBLISH", channel, text]:
                    return publish(cache, channel, text)
                case ["PING"]:
                    return "PONG"
                case ["VERSION"]:
                    return VERSION
                case _:
                    return f"what is {line!r}?"
            return "OK"

        @instance.connections(listener, state=Client)
        async def serve(peer: upgrader.Peer[Client], cache: Cache) -> None:
            async for line in peer.lines():
                await peer.write(f"{await answer(peer, cache, line.decode())}\n".encode())

        async def expire(cache: Cache) -> None:
            while True:
                await asyncio.sleep(0.02)
                now = time.time()
                for due, key in cache.take_due(now):
                    publish(cache, "expired", f"{key} {due:.6f} {now:.6f}")

        if "REFUSE" in os.environ:

            @instance.verify
            def refuse(cache: Cache) -> None:
                raise ValueError(f"not with {len(cache)} keys")

        await instance.serve(tasks=[expire])


asyncio.run(main())
