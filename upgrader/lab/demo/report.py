# SPDX-License-Identifier: LGPL-2.1-or-later
"""Show what a demonstration found, as JSON and as a table for people."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Self

import msgspec

from upgrader.lab.demo.orders import Spread


class Range(msgspec.Struct, frozen=True):
    """Figures of several upgrades, in milliseconds; None where there was nothing to measure."""

    median: float | None
    max: float | None

    @classmethod
    def of(cls, figures: Iterable[float]) -> Self:
        """Return the range of these figures."""
        found = list(figures)
        return cls(round(median(found), 1), round(max(found), 1)) if found else cls(None, None)


class FdCount(msgspec.Struct, frozen=True):
    """Open FDs at a moment at which nothing is outstanding; `store` is how many PID 1 keeps."""

    service: int
    pid1: int
    store: int

    @property
    def total(self) -> int:
        """Return the FDs of both processes; those in the store are among PID 1's."""
        return self.service + self.pid1


class FirstLast(msgspec.Struct, frozen=True):
    """The same figure after the first and after the last upgrade."""

    first: int
    last: int


class LongWaitCount(msgspec.Struct, frozen=True):
    """How many waits of more than ten milliseconds had one cause, and the longest, in milliseconds."""

    count: int
    longest: float


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """One demonstration. Times are milliseconds.

    `generations` counts those that took over; `stall_ms` is the longest wait of any request, from
    due to answered, per upgrade, and `baseline_stall_ms` the same in a window of the same length
    and load with no upgrade in it; `long_waits` counts those of more than 10 ms by what most of each was, and
    `baseline_long_waits` those with no upgrade: the `pause`, the first steps of the new instance (`opening`), a process
    of the service without a CPU (`cpu`), or anything else (`other`); `pause_ms` is how long nobody served, by the new instance's own
    clock; `source_gone_ms` runs from the commit to the end of the old process (live mode);
    `time_to_new_code_ms` runs from the request for the upgrade to the first response of the new
    generation; `restart_ms` and `plain_restart_ms` are from the begin of the stop to READY=1 in
    PID 1's own timestamps, the latter of the same program with UPGRADER=off and no connections
    (restart mode);
    `fds` are those of the service and of PID 1 together; `latency_ms` is that of new connections,
    and `lateness_ms` how late the load client itself was, which is part of every wait.
    """

    mode: str
    systemd: str
    systemd_version: int
    user: str | None
    upgrades: int
    failed_upgrades: list[str]
    generations: int
    requests: int
    failed_requests: int
    keepalive_requests: int
    failed_keepalive: int
    split_requests: int
    failed_split: int
    streams: int
    broken_streams: int
    stream_chunks: int
    connections_held: int
    connections_lost: int
    state_errors: int
    stall_ms: Range
    baseline_stall_ms: Range
    long_waits: dict[str, LongWaitCount]
    baseline_long_waits: dict[str, LongWaitCount]
    pause_ms: Range
    source_gone_ms: Range
    stream_gap_ms: Range
    time_to_new_code_ms: Range
    restart_ms: Range
    plain_restart_ms: Range
    pid1_show_ms: Range
    latency_ms: Spread
    lateness_ms: Spread
    fds: FirstLast
    fd_counts: list[FdCount]
    losses: list[str]

    @property
    def lost(self) -> bool:
        """Return whether anything was lost, or an upgrade failed."""
        return bool(
            self.failed_upgrades
            or self.generations < self.upgrades
            or self.failed_requests
            or self.failed_keepalive
            or self.failed_split
            or self.broken_streams
            or self.connections_lost
            or self.state_errors
        )

    def json(self) -> bytes:
        """Encode it as one JSON object."""
        return msgspec.json.encode(self)

    def table(self) -> str:
        """Format it for people, in about 25 lines."""
        user = f", as user {self.user}" if self.user else ""
        failed = len(self.failed_upgrades)
        title = f"{self.upgrades} upgrades in {self.mode} mode under systemd {self.systemd_version}"
        lines = [
            f"{title} ({self.systemd}){user}",
            "",
            *_columns(
                ("", "in all", "lost"),
                ("upgrades", self.upgrades + failed, failed),
                ("generations that took over", self.generations, ""),
                ("requests on new connections", self.requests, self.failed_requests),
                (
                    "requests on keep-alive connections",
                    self.keepalive_requests,
                    self.failed_keepalive,
                ),
                ("requests cut in two by an upgrade", self.split_requests, self.failed_split),
                ("long streams", self.streams, self.broken_streams),
                ("idle connections held", self.connections_held, self.connections_lost),
                ("contradictions in the state", "", self.state_errors),
            ),
            "",
            *_columns(("", "median", "longest"), *self._times()),
            "",
            *self._wait_lines(),
            *self._fd_lines(),
            *(f"  {loss}" for loss in [*self.failed_upgrades, *self.losses]),
            "SOMETHING WAS LOST." if self.lost else "Nothing was lost.",
        ]
        return "\n".join(lines)

    def _times(self) -> list[tuple[str, str, str]]:
        """Yield the times that were measured in this mode."""
        times: list[tuple[str, Range | Spread]] = [
            ("stall: a request due, not answered", self.stall_ms),
            ("the same with no upgrade", self.baseline_stall_ms),
            ("pause: nobody served", self.pause_ms),
            ("gap between two chunks (50 ms meant)", self.stream_gap_ms),
            ("upgrade asked for to new code answers", self.time_to_new_code_ms),
            ("commit to the old process gone", self.source_gone_ms),
            ("restart, stop to READY=1", self.restart_ms),
            ("plain restart, nothing to load", self.plain_restart_ms),
            ("`systemctl show` meanwhile", self.pid1_show_ms),
            ("the load client itself was late by", self.lateness_ms),
        ]
        return [(name, *_ms(found)) for name, found in times if found.max is not None]

    def _wait_lines(self) -> list[str]:
        """Say what the long waits were, with and without an upgrade."""
        found, baseline = self.long_waits, self.baseline_long_waits
        rows = []
        for cause, label in _CAUSES.items():
            if here := found.get(cause):
                rows.append((label, here.count, f"{here.longest:,.0f} ms"))
        if baseline:
            longest = max(each.longest for each in baseline.values())
            count = sum(each.count for each in baseline.values())
            rows.append(("(with no upgrade, in as long a time)", count, f"{longest:,.0f} ms"))
        head = "waits of more than 10 ms, most of it", "how many", "longest"
        return [*_columns(head, *rows), ""] if rows else []

    def _fd_lines(self) -> list[str]:
        if not self.fd_counts:
            return []
        first, last = self.fd_counts[0], self.fd_counts[-1]
        return [
            "FDs after the first and the last upgrade:",
            f"  service {_number(first.service)} and {_number(last.service)}",
            f"  PID 1   {first.pid1} and {last.pid1}, of which in the FD store {first.store} and {last.store}",
            "",
        ]


_CAUSES = {
    "pause": "the pause",
    "opening": "first steps of the new version",
    "cpu": "the service without a CPU",
    "other": "anything else",
}


def _ms(range_: Range | Spread) -> tuple[str, str]:
    def show(figure: float | None) -> str:
        if figure is None:
            return "-"
        return f"{figure:,.1f} ms" if figure < 100 else f"{figure:,.0f} ms".replace(",", " ")

    return show(range_.median), show(range_.max)


def _number(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def _columns(*rows: Sequence[object]) -> list[str]:
    return [f"  {label:<40}{_number(a):>10}{_number(b):>10}" for label, a, b in rows]
