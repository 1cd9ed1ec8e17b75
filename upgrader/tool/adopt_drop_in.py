# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the lines of the drop-in by which a unit gets a runner as its main process."""

from collections.abc import Iterator, Sequence

from upgrader.protocol.programs import Readiness, known
from upgrader.systemd.unit import UNSET, as_text
from upgrader.tool.adopt_command import FoundProgram, prefix, quoted
from upgrader.tool.adopt_facts import UnitFacts

DROP_IN = "/etc/systemd/system/{unit}.d/60-upgrader-run.conf"
_STORED = 32  # listeners, programs and the image
_LITTLE_TIME = 15_000_000  # microseconds: the drain, and SIGTERM before SIGKILL
_SIGTERM = 15
_CAP_SYS_PTRACE = 1 << 19


def start_line(known_facts: UnitFacts, options: Sequence[str], words: Sequence[str]) -> str:
    """Make ExecStart= of the runner that starts the program `words`."""
    runner = quoted([*known_facts.runner, *options])
    return f"ExecStart={prefix(known_facts.unit.exec_start[-1])}{runner} \\\n    -- {quoted(words)}"


def own_options(known_facts: UnitFacts, found: FoundProgram, words: Sequence[str]) -> Iterator[str]:
    """What a runner would not know by itself."""
    program, default = found.program, known(words[0])
    ready = program.ready
    if not found.known:
        notifies = known_facts.unit.type in ("notify", "notify-reload")
        ready = Readiness.NOTIFY if notifies else Readiness.LISTENING
    if program.passing is not default.passing:
        yield from ("--pass", program.passing)
    if ready is not default.ready:
        yield from ("--ready", ready)
    if program.drain is not default.drain:
        yield from ("--drain-signal", program.drain.name)
    if program.reload and program.reload is not default.reload:
        yield from ("--reload", program.reload.name)
    if known_facts.pid_file:
        yield from ("--pid-file", known_facts.pid_file)


def settings(known_facts: UnitFacts, found: FoundProgram, start: str) -> Iterator[str]:
    """The lines of the drop-in; comments say what they do."""
    unit, properties = known_facts.unit, known_facts.properties
    before = prefix(unit.exec_start[-1])
    privileged = before.replace(":", "")
    runner = quoted(known_facts.runner)

    yield "# Written by `upgrader adopt`; to remove it: upgrader adopt --undo " + unit.id
    yield "[Unit]"
    yield f"# The old {found.name} serves on while the unit fails to start: whoever gave up would leave it."
    yield "StartLimitIntervalSec=0"
    yield ""
    yield "[Service]"
    yield "# A runner holds the listeners, and starts and drains " + found.name + " as its child."
    yield "Type=notify"
    yield "NotifyAccess=exec"
    if as_text(properties.get("PIDFile", "")):
        yield "PIDFile="
    yield "ExecStart="
    yield start
    yield "# Upgrades live if anything has changed that a start would read; else " + _reload(found)
    yield "ExecReload="
    yield f"ExecReload={privileged}{quoted([known_facts.python, '-P'])} -m upgrader.takeover"
    if known_facts.texts("ExecStop"):
        yield f"# The runner ends {found.name}, by {found.program.drain.name}."
        yield "ExecStop="
    yield "# Ends what is left of a stopped unit, and leaves alone what the next start goes on with."
    yield f"ExecStopPost={privileged}{runner} --after-stop"
    yield f"# Only the runner signals {found.name}: the old one serves until the new one does."
    yield "KillMode=process"
    if set(unit.kill_signals) != {_SIGTERM}:
        yield "KillSignal=SIGTERM"
        yield "RestartKillSignal=SIGTERM"
    if unit.restart != "always":
        yield "Restart=always"
    if unit.timeout_stop_usec < _LITTLE_TIME:
        yield "# Time to drain."
        yield "TimeoutStopSec=30"
    yield "# systemd keeps the listeners, and knows each program that may run."
    yield f"FileDescriptorStoreMax={max(unit.fd_store_max, _STORED)}"
    if unit.fd_store_preserve is not None:
        yield "FileDescriptorStorePreserve=yes"
    if not unit.runtime_directories:
        yield f"RuntimeDirectory=upgrader-{unit.id.removesuffix('.service')}"
    if as_text(properties.get("RuntimeDirectoryPreserve", "no")) == "no":
        yield "RuntimeDirectoryPreserve=restart"
    if unit.oom_policy != "continue":
        yield "# Should memory run out while both run, the new one goes, and not the service."
        yield "OOMPolicy=continue"
    bounds = int(properties.get("CapabilityBoundingSet", UNSET))
    if (
        found.program.ready is Readiness.LISTENING
        and not unit.user
        and not bounds & _CAP_SYS_PTRACE
    ):
        yield f"# To see {found.name} listen."
        yield "CapabilityBoundingSet=CAP_SYS_PTRACE"


def _reload(found: FoundProgram) -> str:
    if found.program.reload:
        return f"{found.name} gets {found.program.reload.name}."
    return "nothing is done."
