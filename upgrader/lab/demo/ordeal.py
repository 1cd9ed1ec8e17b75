# SPDX-License-Identifier: LGPL-2.1-or-later
"""Play every fault once under load, and install a good version after each; the faults are in `faults`."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from upgrader.lab.demo.bad_versions import Bad, make
from upgrader.lab.demo.fault_report import FaultRow
from upgrader.lab.demo.faults import FAULTS, Fault
from upgrader.lab.demo.interference import Interference
from upgrader.lab.demo.load_process import LoadProcess
from upgrader.lab.demo.options import DemoError, Options
from upgrader.lab.demo.orchestrator import begin, describe_load, load_of
from upgrader.lab.demo.orders import EndOrder, ReadyEvent, ResultEvent, StopOrder, Window
from upgrader.lab.demo.stage import SERVICE, VERSIONS, Answer, Stage
from upgrader.protocol.parameters import Mode
from upgrader.tool.outcome import Tell

#: Settings with which a hanging version is given up in seconds, and a start limit is no subject.
_DROP_IN = """\
[Unit]
StartLimitIntervalSec=0
[Service]
TimeoutStartSec=15s
RestartSec=100ms
"""
#: Seconds in which the service must serve again, whatever was done to it.
_SERVES = 30.0


def run(options: Options, progress: Tell, faults: Sequence[Fault] = FAULTS) -> list[FaultRow]:
    """Play all faults; raises DemoError and PrivateSystemdError, which say nothing about upgrades."""
    progress(f"booting a private systemd ({options.systemd})")
    with Stage.set_up(options) as stage:
        progress(f"systemd {stage.machine.systemd_version} is up, {SERVICE} runs version 1")
        progress(describe_load(options))
        for bad in Bad:
            stage.add_version(bad, make(bad, stage.text(VERSIONS[0])))
        stage.configure(_DROP_IN)
        rows = []
        for number, fault in enumerate(faults, 1):
            progress(f"fault {number:>2} of {len(faults)}: {fault.name}")
            rows.append(_play(fault, VERSIONS[number % 2], options, stage))
        return rows


def _play(fault: Fault, good: str, options: Options, stage: Stage) -> FaultRow:
    with LoadProcess(stage.machine) as load:
        load.ask(load_of(options), ReadyEvent)
        if fault.version is None:
            stage.remove_version()
        else:
            stage.install(fault.version)
        restarts = stage.show("NRestarts")
        begin(load)
        told = _upgrade(fault, stage)
        if fault.restarts:
            _wait(stage, lambda: stage.show("NRestarts") != restarts)
        stage.install(good)
        if stage.show("ActiveState") in ("inactive", "failed"):
            stage.machine.run(["systemctl", "start", SERVICE])
        _wait(stage, lambda: _serves(stage))
        window = load.ask(EndOrder(upgraded=False), Window)
        then = stage.show("StatusText")
        following = stage.upgrade(Mode.LIVE)
        result = load.ask(StopOrder(), ResultEvent)
    return FaultRow(
        fault=fault.name,
        failed_requests=result.failed_requests + result.failed_keepalive + result.failed_split,
        broken_streams=result.broken_streams,
        connections_lost=result.connections_lost,
        state_errors=result.state_errors,
        stall_ms=window.stall_ms,
        caller_told=told.line,
        exit_code=told.exit_code,
        then=then,
        must_lose=fault.lost,
        next_upgrade=following.line,
        next_upgrade_done=following.exit_code == 0,
        losses=result.losses,
    )


def _upgrade(fault: Fault, stage: Stage) -> Answer:
    """Ask for the upgrade, and do what the fault says to it."""
    if fault.act is None:
        return stage.upgrade(Mode.LIVE)
    with Interference(stage) as upgrade, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.upgrade, Mode.LIVE)
        upgrade.wait_for(fault.phase)
        fault.act(upgrade)
        return asked.result()


def _serves(stage: Stage) -> bool:
    if stage.show("ActiveState") != "active":
        return False
    try:
        # A retired instance may still have the socket for some milliseconds.
        return stage.describe().pid == int(stage.show("MainPID"))
    except DemoError:
        return False


def _wait(stage: Stage, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SERVES
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(
                f"{SERVICE} does not serve again",
                remedy=f"what it said:\n{stage.machine.journal(unit=SERVICE, lines=20)}",
            )
        time.sleep(0.02)
