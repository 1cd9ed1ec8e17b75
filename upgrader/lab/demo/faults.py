# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list of everything that can go wrong with a live upgrade."""

from collections.abc import Callable
from dataclasses import dataclass

from upgrader.lab.demo.bad_versions import Bad
from upgrader.lab.demo.interference import Interference
from upgrader.protocol.phase import Phase

#: Connections end with the last process that has them open, whatever anybody has kept.
_GONE = "the kernel closes what a killed process had open"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    `version` is installed, or none if it is None; `act` is done in `phase`. `lost` says why
    something must be lost; if it is empty, nothing may be. `restarts`: PID 1 starts the service
    once more by itself, some time after the caller has been told.
    """

    name: str
    version: Bad | None = Bad.SLOW
    phase: Phase = Phase.NONE
    act: Callable[[Interference], object] | None = None
    lost: str = ""
    restarts: bool = False


def _kill(who: str) -> Callable[[Interference], None]:
    return lambda upgrade: upgrade.kill(who)


def _systemctl(*words: str) -> Callable[[Interference], object]:
    return lambda upgrade: upgrade.systemctl(*words)


_KILLS = [
    Fault(f"new process killed, {phase}", phase=phase, act=_kill("destination"))
    for phase in (Phase.SETUP, Phase.COLLECTING, Phase.FROZEN, Phase.LOADING)
]

FAULTS = [
    Fault("version missing", None),
    Fault("version exits at once", Bad.EXITS),
    Fault("version hangs", Bad.HANGS),
    Fault("version cannot read the state", Bad.UNREADABLE),
    Fault("version claims too little", Bad.CLAIMS_LESS),
    Fault("version refuses in its check", Bad.REFUSES),
    Fault("version runs out of FDs", Bad.FEW_FDS),
    Fault(
        "version crashes in its first second",
        Bad.CRASHES,
        lost=f"{_GONE}; the state goes back to the switchover",
        restarts=True,
    ),
    *_KILLS,
    Fault(
        f"new process killed, {Phase.COMMITTED}",
        phase=Phase.COMMITTED,
        act=_kill("destination"),
        lost=f"{_GONE}, unless the old process still has it",
        restarts=True,
    ),
    Fault(f"takeover killed, {Phase.SETUP}", phase=Phase.SETUP, act=_kill("takeover")),
    Fault(f"takeover killed, {Phase.LOADING}", phase=Phase.LOADING, act=_kill("takeover")),
    Fault(
        f"old process killed, {Phase.SETUP}",
        phase=Phase.SETUP,
        act=_kill("source"),
        lost=f"{_GONE}, and the state with it",
    ),
    Fault(
        f"old process killed, {Phase.FROZEN}",
        phase=Phase.FROZEN,
        act=_kill("source"),
        lost=f"{_GONE}, unless the new one had just got it all",
    ),
    Fault(f"old process killed, {Phase.LOADING}", phase=Phase.LOADING, act=_kill("source")),
    *(
        Fault(f"systemctl {verb}, {phase}", phase=phase, act=_systemctl(verb))
        for verb in ("daemon-reload", "daemon-reexec")
        for phase in (Phase.SETUP, Phase.LOADING)
    ),
    *(
        Fault(f"systemctl restart, {phase}", phase=phase, act=_systemctl("restart", "web.service"))
        for phase in (Phase.SETUP, Phase.LOADING)
    ),
    Fault(
        f"systemctl stop, {Phase.SETUP}",
        phase=Phase.SETUP,
        act=_systemctl("stop", "web.service"),
        lost="a stop ends the service, and its clients with it",
    ),
]
