# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the demonstration: boot, load, upgrade, measure. The load client checks the answers."""

import contextlib
import time

from upgrader.lab.demo.findings import Findings
from upgrader.lab.demo.load_process import LoadProcess
from upgrader.lab.demo.options import Options
from upgrader.lab.demo.orders import (
    Begin,
    EndOrder,
    Pause,
    Quiet,
    ReadyEvent,
    ResultEvent,
    Resume,
    Start,
    StopOrder,
    Window,
)
from upgrader.lab.demo.probe import Probe
from upgrader.lab.demo.report import DemoReport
from upgrader.lab.demo.stage import HOST, PORT, SERVICE, VERSIONS, Stage
from upgrader.lab.demo.succession import GONE
from upgrader.lab.demo.waits import Switchover
from upgrader.protocol.parameters import Mode
from upgrader.tool.outcome import Tell

#: Seconds of undisturbed load before each upgrade.
BASELINE = 1.0
#: The load's own figures, said to the user and to the load client.
LOAD = Start(host=HOST, port=PORT)


def run(options: Options, progress: Tell) -> DemoReport:
    """Run the demonstration, and report progress on the way.

    It goes on after a loss, and ends at a failed upgrade, because the next one would say nothing.
    Raises DemoError and PrivateSystemdError, which say nothing about upgrades.
    """
    progress(f"booting a private systemd ({options.systemd})")
    with Stage.set_up(options) as stage, LoadProcess(stage.machine) as load:
        progress(f"systemd {stage.machine.systemd_version} is up, {SERVICE} runs version 1")
        kind = {Mode.LIVE: _Live, Mode.RESTART: _Restart}.get(options.mode, _Upgrades)
        upgrades = kind(options, stage, load)
        ready = load.ask(load_of(options), ReadyEvent)
        progress(describe_load(options))
        time.sleep(BASELINE)
        version = ready.version
        for number in range(1, options.upgrades + 1):
            target = VERSIONS[number % 2]
            if (failure := upgrades.upgrade(number, target)) is not None:
                upgrades.findings.failed.append(f"upgrade {number}: {failure}")
                progress(f"upgrade {number} of {options.upgrades}: FAILED: {failure}")
                break
            progress(upgrades.findings.describe(number, version, options))
            version = target
        upgrades.close()
        progress("asking every connection once more")
        result = load.ask(StopOrder(), ResultEvent)
        return upgrades.findings.report(options, stage.machine.systemd_version, result)


class _Upgrades:
    """Upgrades one after the other, each with what is measured around it."""

    def __init__(self, options: Options, stage: Stage, load: LoadProcess) -> None:
        self.findings = Findings()
        self._options = options
        self._stage = stage
        self._load = load
        self._stored = stage.stored()
        self._owned = 0.0  # when the new instance was the owner, in seconds since the epoch

    def upgrade(self, number: int, target: str) -> str | None:
        """Install that version and upgrade to it; return what went wrong, or ""."""
        self._stage.install(target)
        window, failure = self._perform(target)
        if failure is not None:
            return failure
        if window.version != target or window.time_to_new_code_ms is None:
            return f"version {window.version} answers in generation {window.generation}"
        self.findings.windows.append(window)
        time.sleep(BASELINE)
        with self._watched(), self._stage.delays() as delays:
            begin(self._load)
            time.sleep(window.seconds)
            self.findings.baselines.append(self._end(upgraded=False))
        self.findings.baseline_waits.add(self.findings.baselines[-1], None, delays)
        if number in (1, self._options.upgrades):
            self._load.ask(Pause(), Quiet)
            self.findings.fds.append(self._stage.count_fds(self._stored))
            self._load.tell(Resume())
        self._after()
        time.sleep(BASELINE)
        return None

    def close(self) -> None:
        """End what was measured with the last upgrade."""

    def _perform(self, target: str) -> tuple[Window, str | None]:
        """Do one upgrade; return what was seen of it, and what went wrong."""
        with self._stage.delays() as delays:
            with self._watched():
                begun = begin(self._load)
                answer = self._stage.upgrade(self._options.mode)
            window = self._end()
        if answer.exit_code != 0:
            return window, answer.line
        pause = answer.pause or 0.0
        if answer.pause is not None:
            self.findings.pauses.append(pause * 1000)
        self._owned = self._stage.describe().since
        owned = self._owned - time.time() + time.monotonic()
        answered = begun + (window.time_to_new_code_ms or 0.0) / 1000
        switchover = Switchover(owned - pause, owned, answered)
        self.findings.waits.add(window, switchover, delays)
        return window, None

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _after(self) -> None:
        """Measure what belongs to an upgrade and comes after it, under the same load."""

    def _end(self, *, upgraded: bool = True) -> Window:
        sample = -(-self._options.connections // self._options.upgrades) if upgraded else 0
        return self._load.ask(EndOrder(upgraded=upgraded, sample=sample), Window)


class _Live(_Upgrades):
    """Live upgrades, with the moment at which the old process is gone."""

    def _perform(self, target: str) -> tuple[Window, str | None]:
        source = self._stage.departure()
        window, failure = super()._perform(target)
        if failure is not None:
            return window, failure
        gone = source.at()
        if gone is None:
            return window, f"the old process is still there after {GONE:g} s"
        self.findings.gone.append(max(0.0, gone - self._owned) * 1000)
        return window, None


class _Restart(_Upgrades):
    """Restarts, compared with a restart that has nothing to load."""

    def __init__(self, options: Options, stage: Stage, load: LoadProcess) -> None:
        super().__init__(options, stage, load)
        stage.start_plain()
        self._probe = Probe(stage.machine, SERVICE)

    def close(self) -> None:
        self._probe.close()
        self.findings.shows = self._probe.answers

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        return self._probe.asking()

    def _perform(self, target: str) -> tuple[Window, str | None]:
        performed = super()._perform(target)
        if performed[1] is None:
            self.findings.restarts.append(self._stage.restart_ms())
        return performed

    def _after(self) -> None:
        # Under the same load as the upgrade: else the two could not be compared.
        self.findings.plain.append(self._stage.restart_plain())


def begin(load: LoadProcess) -> float:
    """Begin a new window of the load client, and return when, as of `time.monotonic`; waits belong to it from then on."""
    now = time.monotonic()
    load.tell(Begin(at=now))
    return now


def load_of(options: Options) -> Start:
    """Return the load that these options ask for."""
    return Start(host=HOST, port=PORT, streams=options.streams, held=options.connections)


def describe_load(options: Options) -> str:
    """Describe the load for people."""
    held = f", {options.connections} idle connections" if options.connections else ""
    return (
        f"load: {LOAD.rate:g} new connections a second, {LOAD.keepalive} keep-alive connections of"
        f" {LOAD.keepalive_rate:g} requests a second, {options.streams} streams{held}"
    )
