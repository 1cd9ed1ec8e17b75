# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages between the orchestrator and the load client, one JSON object a line.

Times are seconds of CLOCK_MONOTONIC, which all processes of one machine share.
"""

import msgspec

from upgrader.lab.demo.waits import Wait


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="order"):
    """One line on the load client's standard input."""


class Start(Order, frozen=True, kw_only=True, tag="start"):
    """Open all connections and begin; always the first order."""

    host: str
    port: int
    rate: float = 250.0
    """New connections a second."""
    keepalive: int = 10
    """Keep-alive connections."""
    keepalive_rate: float = 20.0
    """Requests a second on each of them."""
    split: int = 4
    """Connections that send half a request before each upgrade and the other half after it."""
    streams: int = 8
    held: int = 0
    """Idle connections, opened before the load begins."""
    timeout: float = 30.0
    """Seconds after which an unanswered request has failed and a silent stream is broken."""


class Begin(Order, frozen=True, kw_only=True, tag="begin"):
    """Begin a new window at `at`, with or without an upgrade in it."""

    at: float


class EndOrder(Order, frozen=True, kw_only=True, tag="end"):
    """End the window: judge it and answer with `Window`."""

    upgraded: bool = True
    """Whether a new generation should answer by now."""
    sample: int = 0
    """So many held connections are asked for one response each."""


class Pause(Order, frozen=True, kw_only=True, tag="pause"):
    """Ask nothing new, and answer `Quiet` once nothing is outstanding (streams go on)."""


class Resume(Order, frozen=True, kw_only=True, tag="resume"):
    """Go on asking."""


class StopOrder(Order, frozen=True, kw_only=True, tag="stop"):
    """Ask every held connection once, settle everything, answer `Result` and exit."""


class OrderEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """One line on the load client's standard output."""


class ReadyEvent(OrderEvent, frozen=True, kw_only=True, tag="ready"):
    """Everything is connected and the load runs."""

    held: int
    version: str
    generation: int


class Quiet(OrderEvent, frozen=True, kw_only=True, tag="quiet"):
    """Nothing is outstanding."""


class Window(OrderEvent, frozen=True, kw_only=True, tag="window"):
    """What the clients saw in one window; the counts are totals since the start."""

    version: str
    generation: int
    seconds: float
    """How long the window was."""
    stall_ms: float
    """The longest time that any request waited, from due to answered."""
    waits: list[Wait]
    """Those of more than ten milliseconds."""
    stream_gap_ms: float
    """The longest time between two chunks of one stream."""
    time_to_new_code_ms: float | None
    """From the request for the upgrade to the first response of a new generation; None: never."""
    failed_requests: int
    failed_keepalive: int
    failed_split: int
    broken_streams: int
    connections_lost: int
    state_errors: int

    @property
    def requests_lost(self) -> int:
        """Return how many requests of all kinds were lost."""
        return self.failed_requests + self.failed_keepalive + self.failed_split


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies in milliseconds."""

    median: float
    p99: float
    max: float


class ResultEvent(OrderEvent, frozen=True, kw_only=True, tag="result"):
    """The whole run."""

    requests: int
    failed_requests: int
    keepalive_requests: int
    failed_keepalive: int
    split_requests: int
    failed_split: int
    streams: int
    broken_streams: int
    chunks: int
    connections_held: int
    connections_lost: int
    state_errors: int
    latency_ms: Spread
    """Of new connections, over the whole run."""
    lateness_ms: Spread
    """Of the load client itself: how long after a request was due it got to it."""
    losses: list[str]
    """The first losses, in words."""


class Fatal(OrderEvent, frozen=True, kw_only=True, tag="fatal"):
    """The load could not be started."""

    message: str


AnyOrder = Start | Begin | EndOrder | Pause | Resume | StopOrder
AnyEvent = ReadyEvent | Quiet | Window | ResultEvent | Fatal

order_decoder = msgspec.json.Decoder(AnyOrder)
event_decoder = msgspec.json.Decoder(AnyEvent)


def line(message: Order | OrderEvent) -> bytes:
    """Encode one message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"
