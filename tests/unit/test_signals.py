# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which signals an instance takes from PID 1 is read from the unit."""

import signal
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1
from typing import Any

import pytest

from upgrader.instance.process import reload_signals, stop_signals
from upgrader.instance.unit_signals import UnitSignals, ask_signals
from upgrader.protocol.rendezvous import BUS
from upgrader.testing.pid1_bus import Pid1Bus


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> UnitSignals:
    values = {"KillSignal": SIGTERM, "RestartKillSignal": SIGTERM, "Type": "notify", **settings}
    typed = {n: ("s" if isinstance(v, str) else "i", v) for n, v in values.items()}
    monkeypatch.setenv(BUS, str(tmp_path / "bus"))
    bus = Pid1Bus(tmp_path / "bus", lambda: typed, list)
    try:
        return ask_signals("web.service")
    finally:
        bus.close()


@pytest.mark.parametrize(
    ("settings", "stops", "reloads", "waits"),
    [
        ({}, {SIGTERM}, set(), False),
        ({"KillSignal": SIGINT}, {SIGTERM, SIGINT}, set(), False),
        ({"RestartKillSignal": SIGQUIT}, {SIGTERM, SIGQUIT}, set(), False),
        ({"KillSignal": 37}, {SIGTERM, 37}, set(), False),  # SIGRTMIN+3
        ({"KillSignal": SIGKILL}, {SIGTERM}, set(), False),  # nobody can catch it
        ({"Type": "notify-reload", "ReloadSignal": SIGHUP}, {SIGTERM}, {SIGHUP}, True),
        ({"Type": "notify-reload", "ReloadSignal": SIGUSR1}, {SIGTERM}, {SIGUSR1}, True),
    ],
)
def test_u6_the_signals_of_a_unit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    stops: set[int],
    reloads: set[int],
    waits: bool,
) -> None:
    """SIGTERM, and what the unit names, unless it cannot be caught."""
    found = asked(tmp_path, monkeypatch, **settings)

    assert (stops, reloads, waits) == (found.stops, found.reloads, found.waits)


def test_u6_a_pid_1_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only what is always caught counts."""
    monkeypatch.setenv(BUS, "/no/such/socket")

    assert UnitSignals(frozenset()) == ask_signals("web.service")


@pytest.mark.parametrize(
    ("supervised", "stops", "reloads"),
    [
        (True, {SIGTERM, SIGINT, SIGQUIT}, {SIGHUP}),
        (False, {SIGTERM, SIGINT}, set()),  # SIGHUP is for the end of a terminal
    ],
)
def test_u3_what_is_always_caught(supervised: bool, stops: set[int], reloads: set[int]) -> None:
    """SIGQUIT and SIGHUP if the program does not handle them itself."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (SIGQUIT, SIGHUP)}
    try:
        assert (stops, reloads) == (stop_signals(supervised), reload_signals(supervised))
        for number in before:
            signal.signal(number, lambda number, frame: None)
        assert {SIGTERM, SIGINT} == stop_signals(supervised)
        assert set() == reload_signals(supervised)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
