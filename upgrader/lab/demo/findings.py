# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collect what a demonstration measures, one entry per upgrade, and make its report."""

from dataclasses import dataclass, field

from upgrader.lab.demo.options import Options
from upgrader.lab.demo.orders import ResultEvent, Window
from upgrader.lab.demo.report import DemoReport, FdCount, FirstLast, LongWaitCount, Range
from upgrader.lab.demo.waits import Delays, Switchover, WaitCause, attribute
from upgrader.protocol.parameters import Mode


@dataclass(slots=True)
class LongWaits:
    """Waits of more than ten milliseconds, in milliseconds, by what most of each was."""

    found: dict[WaitCause, list[float]] = field(default_factory=dict)

    def add(self, window: Window, switchover: Switchover | None, delays: Delays) -> None:
        """Add those of a window, with or without an upgrade in it."""
        for wait in window.waits:
            cause = attribute(wait, switchover, delays.during(wait))
            self.found.setdefault(cause, []).append(wait.seconds * 1000)

    def counts(self) -> dict[str, LongWaitCount]:
        """Return how many there were of each cause."""
        return {c.value: LongWaitCount(len(f), round(max(f), 1)) for c, f in self.found.items()}


@dataclass(slots=True)
class Findings:
    """`baselines` are windows without an upgrade, each as long as the one of the upgrade before.

    Times are milliseconds: `pauses` by the new instance's clock, `gone` from the commit to the end
    of the old process, `restarts` and `plain` in PID 1's timestamps, `shows` of `systemctl show`.
    """

    windows: list[Window] = field(default_factory=list)
    baselines: list[Window] = field(default_factory=list)
    waits: LongWaits = field(default_factory=LongWaits)
    baseline_waits: LongWaits = field(default_factory=LongWaits)
    pauses: list[float] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    shows: list[float] = field(default_factory=list)
    fds: list[FdCount] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def describe(self, number: int, before: str, options: Options) -> str:
        """Describe the last upgrade in one line."""
        window = self.windows[-1]
        lost = {
            "failed requests": window.requests_lost,
            "broken streams": window.broken_streams,
            "lost connections": window.connections_lost,
            "state errors": window.state_errors,
        }
        said = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        took = f"paused {self.pauses[-1]:.1f} ms"
        if options.mode is Mode.LIVE:
            took += f", old process gone after {self.gone[-1]:.0f} ms"
        elif options.mode is Mode.RESTART:
            took = f"restart {self.restarts[-1]:.0f} ms (plain {self.plain[-1]:.0f} ms)"
        return (
            f"upgrade {number:>2} of {options.upgrades}: version {before} -> {window.version},"
            f" {took}, longest wait {window.stall_ms:.0f} ms"
            f" (without upgrade {self.baselines[-1].stall_ms:.0f} ms);"
            f" so far lost: {said or 'nothing'}"
        )

    def report(self, options: Options, systemd: int, result: ResultEvent) -> DemoReport:
        """Make the report; `systemd` is the version that was booted."""
        windows = self.windows
        counts = self.fds[:1] + self.fds[-1:]
        return DemoReport(
            mode=str(options.mode),
            systemd=options.systemd,
            systemd_version=systemd,
            user=options.user,
            upgrades=len(windows),
            failed_upgrades=self.failed,
            generations=len({window.generation for window in windows}),
            requests=result.requests,
            failed_requests=result.failed_requests,
            keepalive_requests=result.keepalive_requests,
            failed_keepalive=result.failed_keepalive,
            split_requests=result.split_requests,
            failed_split=result.failed_split,
            streams=result.streams,
            broken_streams=result.broken_streams,
            stream_chunks=result.chunks,
            connections_held=result.connections_held,
            connections_lost=result.connections_lost,
            state_errors=result.state_errors,
            stall_ms=Range.of(window.stall_ms for window in windows),
            baseline_stall_ms=Range.of(window.stall_ms for window in self.baselines),
            pause_ms=Range.of(self.pauses),
            source_gone_ms=Range.of(self.gone),
            long_waits=self.waits.counts(),
            baseline_long_waits=self.baseline_waits.counts(),
            stream_gap_ms=Range.of(window.stream_gap_ms for window in windows if options.streams),
            time_to_new_code_ms=Range.of(window.time_to_new_code_ms or 0 for window in windows),
            restart_ms=Range.of(self.restarts),
            plain_restart_ms=Range.of(self.plain),
            pid1_show_ms=Range.of(self.shows),
            latency_ms=result.latency_ms,
            lateness_ms=result.lateness_ms,
            fds=FirstLast(counts[0].total, counts[-1].total) if counts else FirstLast(0, 0),
            fd_counts=counts,
            losses=result.losses,
        )
