# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person sees, as text: each command in each situation, on terminals of three widths.

`python -m tests.unit.screens` writes the files, for somebody to look at them.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec

from tests.unit.debian_units import RECORDED, facts
from tests.unit.units import unit
from upgrader.cli import adopt as cli_adopt
from upgrader.cli.check import found
from upgrader.cli.history_dump import recounted
from upgrader.cli.output import told
from upgrader.cli.overview_text import listed, shown
from upgrader.cli.screen import Screen
from upgrader.codes import Code
from upgrader.protocol.kinds import Standing
from upgrader.protocol.parameters import Mode, Parameters
from upgrader.protocol.phase import Phase
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink_types import (
    Backend,
    Connection,
    Description,
    Migration,
    ReplayCounts,
    RunProgram,
    Trial,
)
from upgrader.tool.adopt import AdoptObstacle, ObstacleKind, adoption
from upgrader.tool.blockers import Obstacle, not_ours
from upgrader.tool.check import CheckReport
from upgrader.tool.finding import Finding, Severity
from upgrader.tool.history import HistoryEvent, upgrades
from upgrader.tool.hold import Hold, HoldKind
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.overview import Overview
from upgrader.tool.presence import Presence
from upgrader.tool.unit_errors import BusUnreachable

SCREENS = Path(__file__).with_name("screens")
WIDTHS = (60, 80, 120)
NOW = 1_800_000_000.0
#: Of a program that knows nothing of upgrader.
NOT_OURS = cast(Obstacle, not_ours(unit(id="nginx.service"), Presence()))
NOT_WITH_ME = "holder.refuse refused: ValueError: not with me"
_QEMU = "/usr/bin/qemu-system-x86_64"
REFUSED_QEMU = "preflight: process 4960 has ended with status 1: load of migration failed"
DONE = Migration(
    Phase.DONE, "live", 1, 2, began=NOW - 7500, seconds=0.482, pause=0.0043, fds=3, bytes=2210
)
FAILED = Migration(
    Phase.FAILED, "live", 2, 3, began=NOW - 95, seconds=0.31, reason=NOT_WITH_ME
)  # fmt: skip
PARKED = Migration(
    Phase.FAILED, "restart", 4, began=NOW - 40, seconds=1.2,
    reason="the new instance exited with status 1: ModuleNotFoundError: No module named 'web'",
)  # fmt: skip


def instance(**changes: object) -> Description:
    """What an instance says that serves, after one upgrade."""
    facts = {
        "service": "web",
        "version": "2.1",
        "pid": 4711,
        "generation": 2,
        "phase": Standing.SERVING,
        "library": "0.2.0",
        "since": NOW - 7499.5,
        "states": {"sessions": 3},
        "trials": [Trial("sessions", 3, 2210, 0.0004, NOW)],
        "backends": [Backend("web", "listener", 7, "127.0.0.1:8080", 90210, connections=2, busy=1)],
        "parameters": Parameters().shown() | {"drain-timeout": "1min"},
        "migration": DONE,
        "last_upgrade": DONE,
        "interface": 2,
    }
    return Description(**(facts | changes))  # type: ignore[arg-type]


STATUS = Status(2, Origin.LIVE, 1, 3, 2210, 0, pause=0.0043)
WELL = Overview(
    "web.service", "active (running)", True, 4711, STATUS, instance(), uses_upgrader=True,
    last_upgrade=DONE,
)  # fmt: skip
SWITCH = Overview(
    "switch.service", "active (running)", True, 4715, STATUS,
    instance(
        service="switch",
        backends=[
            Backend("control", "listener", 7, "/run/switch", 90211),
            Backend(
                "uplink", "tap", 8, text="tap0, 2 queues",
                verified=["detached", "device", "flags", "netns"],
            ),
            Backend(
                "routes", "memory", 10, text="sealed: grow, shrink", size=1 << 26,
                verified=["device", "inode", "seals", "size"],
            ),
            Backend("dice", "acme.dice", 11, transfer=False),
        ],
    ),
    uses_upgrader=True, last_upgrade=DONE,
)  # fmt: skip
HELD = Overview(
    "shop.service", "active (running)", True, 4712, STATUS,
    instance(changed=["/usr/lib/shop/shop.py"], migration=FAILED, last_upgrade=FAILED),
    uses_upgrader=True, hold=Hold("shop.service", NOW - 95, NOT_WITH_ME), last_upgrade=FAILED,
)  # fmt: skip
FROZEN = Overview(
    "tickets-of-the-fair@north.service", "active (running)", True, 4714, STATUS, instance(),
    uses_upgrader=True, last_upgrade=DONE,
    hold=Hold("x", NOW - 86400, "no changes before the fair", kind=HoldKind.ADMIN),
)  # fmt: skip
DOWN = Overview(
    "mail.service", "failed (failed)", False, 0, uses_upgrader=True,
    hold=Hold("mail.service", NOW - 39, PARKED.reason), last_upgrade=PARKED,
    parked=("upgrader-listener-smtp", "upgrader-channel-4"),
)  # fmt: skip
OLD = Description(
    "web", pid=4700, generation=1, phase=Standing.DRAINING, connections=2, drains_until=NOW + 42,
    replays=ReplayCounts(suspended=198, lost=17),
    held=[
        Connection("web", "192.0.2.17:50002", 9, 903.0, what="GET /export"),
        Connection("web", "192.0.2.18:50118", 11, 12.5, "read"),
    ],
)  # fmt: skip
DRAINING = Overview(
    "chat.service", "active (running)", True, 4713, STATUS,
    instance(
        migration=Migration(Phase.PREFLIGHT, "live", 2, 3, began=NOW - 5, preflight=True),
        replays=ReplayCounts(moved=195, refused=2, waiting=1),
    ),
    uses_upgrader=True, draining=(OLD,), last_upgrade=DONE,
)  # fmt: skip
FOREIGN = Overview("nginx.service", "active (running)", True, 900)
RUNNER = Overview(
    "nginx.service", "active (running)", True, 4711, STATUS,
    instance(
        service="nginx", version="1.26.3", states={}, trials=[],
        programs=[RunProgram(4801, processes=5, memory=9_400_000, offers=["cpr-exec"]), RunProgram(4720, replaced=True)],
        backends=[
            Backend("http", "listener", 9, "0.0.0.0:80", 90210,
                    addresses=["0.0.0.0:80", "[::]:80"], connections=41),
        ],
    ),
    uses_upgrader=True, last_upgrade=DONE,
)  # fmt: skip
MACHINE = Overview(
    "vm@web.service", "active (running)", True, 4711, STATUS,
    instance(
        service="vm", states={}, trials=[], backends=[], changed=[_QEMU],
        programs=[RunProgram(4801, memory=96_000_000, offers=["cpr-transfer"], deleted=_QEMU)],
    ),
    uses_upgrader=True, hold=Hold("vm@web.service", NOW - 95, REFUSED_QEMU),
    last_upgrade=msgspec.structs.replace(FAILED, reason=REFUSED_QEMU),
)  # fmt: skip
NO_BUS = BusUnreachable("web.service", "No such file or directory")


def lists() -> Iterator[tuple[str, Screen, str]]:
    for there in _screens():
        units = [DRAINING, DOWN, HELD, FROZEN, WELL]
        yield "every situation", there, listed(there, units, NOW)
        gone = BusUnreachable("", NO_BUS.reason)
        yield "no bus", there, told(there, Outcome.of_error(Verb.LIST, "", gone))


def states() -> Iterator[tuple[str, Screen, str]]:
    situations = {
        "all well": WELL, "held": HELD, "failed": DOWN, "draining": DRAINING, "other kinds": SWITCH,
        "foreign": FOREIGN, "a runner": RUNNER, "a machine": MACHINE,
    }  # fmt: skip
    for there in _screens():
        for name, overview in situations.items():
            yield name, there, "\n".join(shown(there, overview, NOW))
        yield "no bus", there, told(there, Outcome.of_error(Verb.STATUS, "web", NO_BUS))


def checks() -> Iterator[tuple[str, Screen, str]]:
    edit = "systemctl edit shop.service, and below [Service] write NotifyAccess=exec"
    access = "NotifyAccess=main: what ExecReload= starts could not notify systemd"
    held = f"it is on hold: hooks leave it alone ({HELD.hold})"
    situations = {
        "all well": CheckReport("web.service", True, (), preflight=True),
        "held": CheckReport(
            "shop.service", True,
            (
                Finding(Severity.RESTART_ONLY, access, edit, "NotifyAccess=exec"),
                Finding(Severity.WARNING, held, "put a good version in place and upgrade"),
            ),
        ),
        "failed": CheckReport(
            "mail.service", False,
            (Finding(Severity.BLOCKER, "it is not running (failed)", "upgrader upgrade mail"),),
        ),
        "foreign": CheckReport(
            "nginx.service", True,
            (Finding(Severity.BLOCKER, NOT_OURS.cause, NOT_OURS.remedy),),
        ),
    }  # fmt: skip
    for there in _screens():
        for name, report in situations.items():
            yield name, there, "\n".join(found(there, report))
        yield "no bus", there, told(there, Outcome.of_error(Verb.CHECK, "web", NO_BUS))


def outcomes() -> Iterator[tuple[str, Screen, str]]:
    situations = {
        "all well": Outcome.done(
            Verb.UPGRADE, "web.service", f"upgraded in 482ms: {STATUS}", mode=Mode.LIVE
        ),
        "held": Outcome.failed(
            Verb.UPGRADE, "shop.service", Result.HELD, str(FROZEN.hold),
            "when that is over: upgrader unhold shop.service",
        ),
        "failed": Outcome.failed(
            Verb.UPGRADE, "shop.service", Result.OLD_SERVES, NOT_WITH_ME,
            "put a good version in place; see: journalctl -u shop.service", mode=Mode.LIVE,
            code=Code.VERIFY_FAILED,
        ),
        "failed, nobody serves": Outcome.failed(
            Verb.UPGRADE, "mail.service", Result.NOT_SERVING, PARKED.reason,
            "the image of generation 4 is kept until a good version is in place\n"
            "then: upgrader upgrade mail.service",
        ),
        "foreign": Outcome.failed(
            Verb.UPGRADE, "nginx.service", Result.OLD_SERVES, NOT_OURS.cause, NOT_OURS.remedy,
        ),
        "no bus": Outcome.of_error(Verb.UPGRADE, "web", NO_BUS),
    }  # fmt: skip
    for there in _screens():
        for name, outcome in situations.items():
            yield name, there, told(there, outcome)


def pasts() -> Iterator[tuple[str, Screen, str]]:
    for there in _screens():
        yield "every situation", there, recounted(there, upgrades(EVENTS))
        yield "no bus", there, told(there, Outcome.of_error(Verb.HISTORY, "web", NO_BUS))


def adoptions() -> Iterator[tuple[str, Screen, str]]:
    for there in _screens():
        for name in RECORDED:
            plan = adoption(facts(name))
            yield name, there, "\n".join(cli_adopt.shown(there, plan))
        plan = adoption(facts("nginx.service"))
        yield "written", there, "\n".join(cli_adopt.shown(there, plan, written=True))
        adopted = replace(plan, adopted=True, pending=True)
        yield "adopted", there, "\n".join(cli_adopt.shown(there, adopted))
        failed = plan.refused(AdoptObstacle(ObstacleKind.TRIAL, "it does not work", "look"))
        yield "tried in vain", there, "\n".join(cli_adopt.shown(there, failed))


def _event(ago: float, side: str, phase: str, outcome: str, **more: object) -> HistoryEvent:
    facts = {
        "time": NOW - ago,
        "generation": 0,
        "side": side,
        "phase": phase,
        "outcome": outcome,
        "message": "",
    }
    return HistoryEvent(**(facts | more))  # type: ignore[arg-type]


_TIMES = (("setup", 0.45), ("collecting", 0.002), ("frozen", 0.001), ("loading", 0.003))
EVENTS = [
    _event(9000, "destination", "load", "done", generation=1, message="generation 1, cold start"),
    _event(7500, "destination", "load", "done", generation=2, mode="live", source=1, destination=2,
           id="a", pause=0.0043, seconds=0.0043, fds=3, bytes=2210, left_behind=1),
    _event(7499, "source", "migrate", "done", generation=1, mode="live", source=1, destination=2,
           id="a", pause=0.0031, seconds=0.482, fds=3, times=_TIMES),
    _event(500, "source", "migrate", "done", generation=2, mode="live", source=2, destination=3,
           id="b", code="preflight-passed", preflight=True, seconds=0.4, times=_TIMES,
           message="generation 2 serves on: preflight passed", reason="all was loaded and checked"),
    _event(400, "source", "migrate", "failed", generation=2, mode="live", source=2, destination=3,
           id="c", code="verify-failed", preflight=True, seconds=0.41, reason=NOT_WITH_ME),
    _event(95, "source", "migrate", "failed", generation=2, mode="live", source=2, destination=3,
           id="d", code="verify-failed", seconds=0.31, times=_TIMES, reason=NOT_WITH_ME),
    _event(95, "takeover", "upgrade", "failed", generation=2, id="d", code="verify-failed",
           message="not upgraded, the running instance serves on: not with me"),
    _event(80, "source", "migrate", "failed", generation=2, mode="live", source=2, destination=3,
           id="e", code="cancelled", seconds=1.3, reason="cancelled"),
    _event(60, "takeover", "upgrade", "failed", generation=2, id="f", code="limit",
           reason="the unit has no RuntimeDirectory=, so its instance has no socket"),
    _event(50, "source", "park", "done", generation=2, message="generation 2 parked: 3 FDs"),
    _event(45, "destination", "load", "failed", message="failed to load: ImageError: damaged"),
    _event(40, "destination", "load", "done", generation=3, mode="restart", source=2, destination=3,
           seconds=11.9147, pause=11.9147, fds=3, bytes=2210),
]  # fmt: skip


def _screens() -> Iterator[Screen]:
    for width in WIDTHS:
        yield Screen(width, ellipsis="…", arrow="→")


ALL = {
    "list": lists, "status": states, "check": checks, "upgrade": outcomes, "history": pasts,
    "adopt": adoptions,
}  # fmt: skip


def text(name: str) -> str:
    """All screens of one command."""
    parts = []
    for situation, there, seen in ALL[name]():
        title = f" {situation}, {there.width} columns "
        parts.append(f"{title:=^{there.width or 0}}\n{seen}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ["TZ"] = "UTC"
    time.tzset()
    SCREENS.mkdir(exist_ok=True)
    for each in ALL:
        (SCREENS / f"{each}.txt").write_text(text(each))
