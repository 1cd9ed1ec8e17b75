# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find what surprises in a unit whose main process is a runner, for `check`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from upgrader.protocol.programs import MOST_DRAINED
from upgrader.protocol.varlink_types import Description
from upgrader.protocol.wording import show_bytes
from upgrader.systemd.unit import UNSET, Unit, commands
from upgrader.tool import unit_processes
from upgrader.tool.finding import Finding, Severity, edit
from upgrader.tool.unit_sockets import open_sockets

_AFTER_STOP = "--after-stop"
#: Settings with which a program cannot outlive the stop of its unit.
_BOUND = ("PrivateTmp", "DynamicUser")


def about_runner(
    unit: Unit,
    instance: Description,
    values: Mapping[str, Any],
    pids: Sequence[int],
    others: Sequence[int],
    python: str,
) -> Iterator[Finding]:
    """All that is worth a warning. `values`: the D-Bus properties of the unit; `pids`: its processes;
    `others`: those of them that belong to upgrades; `python`: the interpreter of its main process."""
    yield from _about_settings(unit, values, python)
    yield from _about_memory(unit, instance)
    own = {f"unix:{path}" for each in instance.programs for path in each.sockets}
    yield from _about_sockets(unit, pids, own)
    looked_after = [*others, *(each.pid for each in instance.programs)]
    if strays := unit_processes.strays(unit.main_pid, looked_after, pids):
        yield Finding(
            Severity.WARNING,
            f"its programs have left these alone, and a stop ends them: {unit_processes.named(strays)}",
            "keep their parent running, or start them in a unit of their own (systemd-run)",
        )


def _about_settings(unit: Unit, values: Mapping[str, Any], python: str) -> Iterator[Finding]:
    if unit.start_limit_usec:
        yield Finding(
            Severity.WARNING,
            "StartLimitIntervalSec= is not 0: once systemd gives up to start the unit, nobody looks after the"
            " old program",
            f"systemctl edit {unit.id}, and below [Unit] write StartLimitIntervalSec=0",
        )
    after = commands(values.get("ExecStopPostEx", ()))
    if not any(_AFTER_STOP in line.arguments for line in after):
        what = "no ExecStopPost= ends the programs that are left after a stop or a crash"
        setting = f"ExecStopPost={python} -m upgrader.run {_AFTER_STOP}"
        yield Finding.to_set(Severity.WARNING, unit, what, setting)
    for name in _BOUND:
        if values.get(name) not in (None, False, "", "no"):
            yield Finding(
                Severity.WARNING,
                f"{name}=: a program cannot outlive the stop of its unit, so at a restart it is drained"
                " first, and clients wait in the backlog",
                f"upgrade it live, or systemctl edit {unit.id}, and below [Service] write {name}=no",
            )


def _about_memory(unit: Unit, instance: Description) -> Iterator[Finding]:
    """A program that is drained for hours keeps its memory, and there may be several."""
    one = max((each.memory for each in instance.programs), default=0)
    wanted = one * (1 + MOST_DRAINED)
    if unit.memory_max != UNSET and wanted > unit.memory_max:
        yield Finding(
            Severity.WARNING,
            f"MemoryMax={show_bytes(unit.memory_max)} is little for a program of {show_bytes(one)}:"
            f" beside the one that serves, {MOST_DRAINED} may be drained",
            edit(unit, f"MemoryMax={2 * wanted >> 20}M, or have it drained sooner: --drain-limit"),
        )


def _about_sockets(unit: Unit, pids: Sequence[int], own: Collection[str]) -> Iterator[Finding]:
    """What its programs bind themselves, and what nobody accepts from; `own`: addresses that no other
    program wants."""
    try:
        sockets = open_sockets(pids)
    except PermissionError:
        yield Finding(
            Severity.WARNING,
            "this user may not look at the sockets of its programs",
            "run the command as root, with sudo for instance",
        )
        return
    for each in (found for found in sockets if found.address not in own):
        if unit.main_pid not in each.pids and not each.removed:
            yield Finding(
                Severity.WARNING,
                f"its program has bound {each} itself: a new one beside it could not, and the upgrade"
                " would fail",
                f"have the runner hold it: --listen NAME={each.address} in ExecStart=, and a stop and a"
                " start",
            )
        elif each.pids == {unit.main_pid}:
            yield Finding(
                Severity.WARNING,
                f"its program does not accept from {each}, and clients of it wait for ever",
                "leave it out of --listen, or have the program use it; see docs/programs.md",
            )
