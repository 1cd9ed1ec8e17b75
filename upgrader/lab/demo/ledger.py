# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keep the books of the load client: what was asked, what came back, what contradicts. Does no IO and reads no clock.

A service that loses nothing keeps these rules:

- every request is answered once, whole, with the body that was asked for;
- `Service-Requests`, the counter in the service's state, is a different number in every response, and in the end every
  number was seen: nothing counted twice, forgotten, or counted and not answered (all clients are ours);
- `Connection-Requests`, the connection's own state, goes up by one with every response of the connection;
- a generation has one version, and a connection never goes back to an older generation;
- the chunks of a stream are numbered 1, 2, 3, ... and carry a checksum of all before;
- version 2 says `Service-Streamed`, which is new in its state, so it counts from its own start; version 1 does not.
"""

import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from upgrader.lab.demo.orders import ResultEvent, Spread
from upgrader.lab.demo.responses import Response
from upgrader.lab.demo.waits import LONG, Wait

#: So many losses are told in words; all are counted.
LOSSES_TOLD = 20
#: So many long waits of one window are kept.
LONG_WAITS = 10_000


class RequestKind(StrEnum):
    """The kinds of client."""

    NEW = "new connection"
    KEEPALIVE = "keep-alive connection"
    SPLIT = "request in two halves"
    STREAM = "stream"
    HELD = "held connection"


class ContradictionError(Exception):
    """The response or chunk is not what was asked for; `counted` if it says that the service counted the request."""

    counted = False


class WrongBodyError(ContradictionError):
    """The head of the response is right, its body is not."""

    counted = True


@dataclass(slots=True)
class Exchange:
    """One request: `due` is when it had to be sent, even if it was sent later."""

    kind: RequestKind
    due: float
    path: str


@dataclass(slots=True)
class Track:
    """What one connection has shown so far."""

    requests: int = 0
    generation: int = 0
    sequence: int = 0
    checksum: int = 0
    chunk_at: float = 0.0


@dataclass(slots=True)
class Span:
    """One window as the clients see it, from `begin` on; open until `end` is known."""

    begin: float
    generation: int
    end: float = float("inf")
    stall: float = 0.0
    gap: float = 0.0
    waits: list[Wait] = field(default_factory=list)

    def touches(self, since: float, until: float) -> bool:
        """Return whether the time from `since` to `until` overlaps this one."""
        return since <= self.end and until >= self.begin


@dataclass(slots=True)
class Ledger:
    """All counts of one run."""

    asked: Counter[RequestKind] = field(default_factory=Counter)
    failed: Counter[RequestKind] = field(default_factory=Counter)
    state_errors: int = 0
    losses: list[str] = field(default_factory=list)
    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    lateness: "array[float]" = field(default_factory=lambda: array("d"))
    generation: int = 0
    versions: dict[int, str] = field(default_factory=dict)
    first_seen: dict[int, float] = field(default_factory=dict)
    span: Span | None = None
    chunks: Counter[int] = field(default_factory=Counter)
    streamed: dict[int, int] = field(default_factory=dict)
    _uncounted: int = 0
    _counted: int | None = None
    _ahead: set[int] = field(default_factory=set)

    def fail(
        self, kind: RequestKind, since: float, now: float, reason: str, *, counted: bool = False
    ) -> None:
        """Count a failed request, a broken stream, or a lost connection."""
        self.failed[kind] += 1
        self._uncounted += not counted
        self._tell(f"{kind}: {reason}")
        self._observe_wait(kind, since, now)

    def answer(self, exchange: Exchange, track: Track, response: Response, now: float) -> None:
        """Enter a response; raises `ContradictionError` if it is not the one that was asked for."""
        version = response.headers.get("service-version", "")
        generation = _integer(response, "service-generation")
        session = _integer(response, "connection-requests")
        self._count(_integer(response, "service-requests"))
        self._observe_generation(exchange.kind, track, generation, version, now)
        if session != track.requests + 1:
            self._wrong(
                f"{exchange.kind}: its request {track.requests + 1} was counted as {session}"
            )
        track.requests = session
        self._observe_streamed(generation, version, response)
        if exchange.kind is RequestKind.NEW:
            self.latencies.append(now - exchange.due)
        self._observe_wait(exchange.kind, exchange.due, now)
        _whole(exchange, response)

    def chunk(self, track: Track, data: bytes, now: float) -> None:
        """Enter a chunk of a stream; raises `ContradictionError` on a gap, a repeat or a wrong checksum."""
        try:
            sequence, generation = (int(word) for word in data.split()[:2])
            checksum = int(data.split()[2], 16)
        except (ValueError, IndexError):
            raise ContradictionError(f"chunk {track.sequence + 1} reads {data[:40]!r}") from None
        expected = zlib.crc32(b"%d %d\n" % (sequence, generation), track.checksum)
        if sequence != track.sequence + 1:
            raise ContradictionError(f"chunk {sequence} came after chunk {track.sequence}")
        if checksum != expected:
            raise ContradictionError(
                f"chunk {sequence} has checksum {checksum:08x}, not {expected:08x}"
            )
        if self.span is not None and self.span.touches(track.chunk_at, now):
            self.span.gap = max(self.span.gap, now - track.chunk_at)
        track.sequence, track.checksum, track.chunk_at = sequence, checksum, now
        self.chunks[generation] += 1

    def close(self) -> None:
        """Judge what only the whole run shows; nothing may arrive after this."""
        if self._counted is not None and self._ahead:
            missing = max(self._ahead) - self._counted - len(self._ahead)
            # A request that failed may have been counted: it is one loss, not two.
            if (missing := missing - self._uncounted) > 0:
                self._wrong(f"{missing} requests were counted that nobody asked", missing)
        for generation, streamed in sorted(self.streamed.items()):
            sent, known = 0, False
            while self.versions.get(generation) == "2":
                sent += self.chunks[generation]
                known = min(self.versions) < generation
                generation -= 1
            if known and streamed > sent:
                self._wrong(f"version 2 counted {streamed} chunks, the streams got {sent}")

    def result(self, streams: int, held: int) -> ResultEvent:
        """Return the counts as one message."""
        return ResultEvent(
            requests=self.asked[RequestKind.NEW],
            failed_requests=self.failed[RequestKind.NEW],
            keepalive_requests=self.asked[RequestKind.KEEPALIVE],
            failed_keepalive=self.failed[RequestKind.KEEPALIVE],
            split_requests=self.asked[RequestKind.SPLIT],
            failed_split=self.failed[RequestKind.SPLIT],
            streams=streams,
            broken_streams=self.failed[RequestKind.STREAM],
            chunks=self.chunks.total(),
            connections_held=held,
            connections_lost=self.failed[RequestKind.HELD],
            state_errors=self.state_errors,
            latency_ms=_spread(self.latencies),
            lateness_ms=_spread(self.lateness),
            losses=self.losses,
        )

    def _observe_wait(self, kind: RequestKind, since: float, now: float) -> None:
        # Held connections are asked all at once, which is nobody's idea of a load.
        if kind is not RequestKind.HELD and self.span is not None and self.span.touches(since, now):
            self.span.stall = max(self.span.stall, now - since)
            if now - since > LONG and len(self.span.waits) < LONG_WAITS:
                self.span.waits.append(Wait(since, now))

    def _observe_generation(
        self, kind: RequestKind, track: Track, generation: int, version: str, now: float
    ) -> None:
        if generation < track.generation:
            self._wrong(
                f"{kind}: answered by generation {generation} after generation {track.generation}"
            )
        track.generation = generation
        self.first_seen.setdefault(generation, now)
        self.generation = max(self.generation, generation)
        if self.versions.setdefault(generation, version) != version:
            self._wrong(
                f"generation {generation} says it is version {version} and {self.versions[generation]}"
            )

    def _observe_streamed(self, generation: int, version: str, response: Response) -> None:
        if ("service-streamed" in response.headers) != (version == "2"):
            self._wrong(
                f"version {version} {'has' if version != '2' else 'lacks'} the field of version 2"
            )
        elif version == "2":
            streamed = _integer(response, "service-streamed")
            self.streamed[generation] = max(streamed, self.streamed.get(generation, 0))

    def _count(self, counted: int) -> None:
        if self._counted is None:
            self._counted = counted
        elif counted <= self._counted or counted in self._ahead:
            self._wrong(f"the service's counter was {counted} twice")
        else:
            self._ahead.add(counted)
            while self._counted + 1 in self._ahead:
                self._counted += 1
                self._ahead.remove(self._counted)

    def _wrong(self, reason: str, times: int = 1) -> None:
        self.state_errors += times
        self._tell(f"state: {reason}")

    def _tell(self, loss: str) -> None:
        if len(self.losses) < LOSSES_TOLD:
            self.losses.append(loss)


def milliseconds(seconds: float) -> float:
    """Round to a tenth of a millisecond, as all figures of the demo."""
    return round(seconds * 1000, 1)


def _spread(seconds: "array[float]") -> Spread:
    ordered = sorted(seconds) or [0.0]
    return Spread(
        median=milliseconds(ordered[len(ordered) // 2]),
        p99=milliseconds(ordered[len(ordered) * 99 // 100]),
        max=milliseconds(ordered[-1]),
    )


def _whole(exchange: Exchange, response: Response) -> None:
    if response.status != 200:
        raise WrongBodyError(f"status {response.status} for {exchange.path}")
    if response.chunked != (exchange.kind is RequestKind.STREAM):
        raise WrongBodyError(f"{exchange.path} was answered as if it were something else")
    if response.chunked:
        return
    checksum = response.headers.get("body-crc32")
    if checksum != f"{zlib.crc32(response.body):08x}":
        raise WrongBodyError(
            f"the body of {exchange.path} has not the checksum {checksum} that its head says"
        )
    if f" {exchange.path} ".encode() not in response.body:
        raise WrongBodyError(f"asked for {exchange.path}, got {response.body[:60]!r}")


def _integer(response: Response, name: str) -> int:
    try:
        return int(response.headers[name])
    except (KeyError, ValueError):
        raise ContradictionError(f"the response has no number in {name}") from None
