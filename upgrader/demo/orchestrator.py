# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives the demonstration: boots, loads, upgrades, measures, reports; the checking of answers is the load client's."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from upgrader.demo.loading import LoadProcess
from upgrader.demo.options import Options
from upgrader.demo.orders import (
    Begin,
    End,
    Pause,
    Quiet,
    Ready,
    Result,
    Resume,
    Start,
    Stop,
    Window,
)
from upgrader.demo.probe import Probe
from upgrader.demo.report import FdCount, FirstLast, Range, Report
from upgrader.demo.stage import HOST, PORT, SERVICE, VERSIONS, Stage, outcome_line

Progress = Callable[[str], None]

#: Seconds of undisturbed load before each upgrade.
BASELINE = 1.0
#: The load's own figures, said to the user and to the load client.
LOAD = Start(host=HOST, port=PORT)


@dataclass(slots=True)
class Findings:
    """What has been measured so far; one entry per upgrade."""

    windows: list[Window] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    fds: list[FdCount] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run(options: Options, progress: Progress) -> Report:
    """Give the demonstration and say on the way how it goes.

    A loss does not end it; a failed upgrade does, because the next one would say nothing. Raises
    DemoError and PrivateSystemdError, which say nothing about upgrades.
    """
    progress(f"booting a private systemd ({options.systemd})")
    with Stage.set_up(options) as stage, LoadProcess(stage.machine) as load:
        stage.start_plain()
        progress(f"systemd {stage.machine.systemd_version} is up, {SERVICE} runs version 1")
        ready = load.ask(_load_of(options), Ready)
        progress(_describe(options))
        probe = Probe(stage.machine, SERVICE)
        findings = Findings()
        time.sleep(BASELINE)
        version = ready.version
        for number in range(1, options.upgrades + 1):
            target = VERSIONS[number % 2]
            if not _upgrade(number, target, options, stage, load, probe, findings):
                progress(f"upgrade {number} of {options.upgrades}: FAILED: {findings.failed[-1]}")
                break
            progress(_describe_upgrade(number, version, options, findings))
            version = target
        probe.close()
        progress("asking every connection once more")
        result = load.ask(Stop(), Result)
        return _report(options, stage.machine.systemd_version, findings, probe.answers, result)


def _upgrade(
    number: int,
    target: str,
    options: Options,
    stage: Stage,
    load: LoadProcess,
    probe: Probe,
    findings: Findings,
) -> bool:
    stage.install(target)
    with probe.asking():
        load.tell(Begin(upgrade=number, at=time.monotonic()))
        done = stage.upgrade(options.mode)
    window = load.ask(End(sample=-(-options.connections // options.upgrades)), Window)
    if done.returncode != 0:
        findings.failed.append(f"upgrade {number}: {outcome_line(done)}")
        return False
    if window.version != target or window.time_to_new_code_ms is None:
        findings.failed.append(
            f"upgrade {number}: version {window.version} answers in generation {window.generation},"
            f" though `upgrader upgrade` said: {outcome_line(done)}"
        )
        return False
    findings.windows.append(window)
    findings.restarts.append(stage.restart_ms())
    load.ask(Pause(), Quiet)
    findings.fds.append(stage.count_fds())
    load.tell(Resume())
    # Under the same load as the upgrade: else the two could not be compared.
    findings.plain.append(stage.restart_plain())
    time.sleep(BASELINE)
    return True


def _load_of(options: Options) -> Start:
    return Start(host=HOST, port=PORT, streams=options.streams, held=options.connections)


def _describe(options: Options) -> str:
    held = f", {options.connections} idle connections" if options.connections else ""
    return (
        f"load: {LOAD.rate:g} new connections a second, {LOAD.keepalive} keep-alive connections of"
        f" {LOAD.keepalive_rate:g} requests a second, {options.streams} streams{held}"
    )


def _describe_upgrade(number: int, before: str, options: Options, findings: Findings) -> str:
    window = findings.windows[-1]
    lost = {
        "failed requests": window.failed_requests + window.failed_keepalive + window.failed_split,
        "broken streams": window.broken_streams,
        "lost connections": window.connections_lost,
        "state errors": window.state_errors,
    }
    said = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
    return (
        f"upgrade {number:>2} of {options.upgrades}: version {before} -> {window.version},"
        f" restart {findings.restarts[-1]:.0f} ms (plain {findings.plain[-1]:.0f} ms),"
        f" longest wait {window.stall_ms:.0f} ms; so far lost: {said or 'nothing'}"
    )


def _report(
    options: Options, systemd: int, findings: Findings, shows: list[float], result: Result
) -> Report:
    windows = findings.windows
    counts = findings.fds[:1] + findings.fds[-1:]
    return Report(
        mode=str(options.mode),
        systemd=options.systemd,
        systemd_version=systemd,
        user=options.user,
        upgrades=len(windows),
        failed_upgrades=findings.failed,
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
        stream_gap_ms=Range.of(window.stream_gap_ms for window in windows if options.streams),
        time_to_new_code_ms=Range.of(window.time_to_new_code_ms or 0 for window in windows),
        restart_ms=Range.of(findings.restarts),
        plain_restart_ms=Range.of(findings.plain),
        pid1_show_ms=Range.of(shows),
        latency_ms=result.latency_ms,
        lateness_ms=result.lateness_ms,
        fds=FirstLast(counts[0].total, counts[-1].total) if counts else FirstLast(0, 0),
        fd_counts=counts,
        losses=result.losses,
    )
