# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plan how an ordinary unit gets a runner as its main process: the drop-in, what it costs, or why not.

Read are properties of PID 1, and what the processes of the unit listen on; no unit file is.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from upgrader.protocol.programs import DIRECTORY, Readiness, known
from upgrader.protocol.wording import show_bytes
from upgrader.systemd.live_limits import is_runner
from upgrader.systemd.unit import UNSET, AccessDenied, Unit, as_text, commands
from upgrader.tool.adopt_command import (
    FoundProgram,
    NotRewritten,
    find,
    prefix,
    quoted,
    rewritten,
)
from upgrader.tool.live_mode import turned_away
from upgrader.tool.presence import look
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_sockets import OpenSocket, open_sockets

DROP_IN = "/etc/systemd/system/{unit}.d/60-upgrader-run.conf"
#: Before the name of a unit: that of its trial, and of its directory in /run.
TRIAL = "upgrader-trial-"
#: What distributions install; packaging/lib/run.
_PACKAGED = "/usr/lib/upgrader/run"
_NAMES = {80: "http", 443: "https"}
_STORED = 32  # listeners, programs and the image
_LITTLE_TIME = 15_000_000  # microseconds: the drain, and SIGTERM before SIGKILL
_SIGTERM = 15
_SYSTEMD = ("/usr/lib/systemd/", "/lib/systemd/")
_CAP_SYS_PTRACE = 1 << 19
#: Types of units of which the main process is a program that serves.
_TYPES = ("simple", "exec", "forking", "notify", "notify-reload", "idle")
_BEFORE, _AFTER = ("ExecStartPre", "ExecStartPost"), ("ExecStopPost",)


class ObstacleKind(StrEnum):
    """Why a unit cannot be adopted, as one word for programs."""

    NOT_SERVING = "not-serving"  #: what it listens on is not known
    USES_UPGRADER = "uses-upgrader"  #: its program has the library, and needs no runner
    UNIT_TYPE = "unit-type"  #: it has no main process that serves, or owns a name on the bus
    EXCLUSIVE = "exclusive"  #: two of the program cannot be beside each other
    BINDS = "binds"  #: the program takes no listeners
    NO_LISTENER = "no-listener"
    DATAGRAMS = "datagrams"
    PRIVATE_PIDS = "private-pids"
    BUS = "bus"  #: nothing inside the unit may ask systemd
    COMMAND = (
        "command"  #: its command line cannot be rewritten, or a file of an admin cannot be read
    )
    TRIAL = "trial"  #: it was tried, and does not work


@dataclass(frozen=True, slots=True)
class AdoptObstacle:
    """Why a unit cannot be adopted, and what to do about it."""

    kind: ObstacleKind
    cause: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Listened:
    """One listener of the unit: its name below a runner, its address, and whether a `.socket` unit
    passes it."""

    name: str
    address: str
    passed: bool = False

    def option(self, trial: str = "") -> str:
        """For --listen. In a trial, with `trial` as its directory, nothing is passed, and the user of
        the service may not make files wherever PID 1 may."""
        if not (trial and self.passed):
            return self.name if self.passed else f"{self.name}={self.address}"
        address = f"unix:{trial}/{self.name}" if self.address.startswith("unix:/") else self.address
        return f"{self.name}={address}"


@dataclass(frozen=True, slots=True)
class Adoption:
    """What adopting a unit would do.

    `lines` are the settings with comments, as they are in the drop-in at `path`; `costs` are
    sentences. `adopted`: its main process is to be a runner; `pending`: it is none before a restart.
    `left_alone` are sockets that the program renames into place itself.
    """

    unit: str
    path: str
    program: str = ""
    listens: tuple[Listened, ...] = ()
    lines: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    refusals: tuple[AdoptObstacle, ...] = ()
    adopted: bool = False
    pending: bool = False
    left_alone: tuple[str, ...] = ()
    pid_file: str = ""
    start: str = ""  #: the line of ExecStart= for a trial, where nothing is passed by systemd

    @property
    def text(self) -> str:
        """The drop-in."""
        return "".join(f"{line}\n" for line in self.lines)

    def refused(self, refusal: AdoptObstacle) -> "Adoption":
        """The same without a drop-in."""
        return replace(self, lines=(), costs=(), refusals=(refusal,))

    def json(self, **more: object) -> bytes:
        """One object: the fields, without what only a trial needs, and `more`."""
        values = msgspec.to_builtins(self)
        del values["start"]
        return msgspec.json.encode(values | more)


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """What is known of a unit that is to be adopted. `executable`: the file that its main process
    executes; `pid_file`: the file with its PID; `activated`: names of `.socket` units' listeners, by
    address."""

    unit: Unit
    properties: Mapping[str, Any]
    sockets: tuple[OpenSocket, ...] = ()
    executable: str = ""
    pid_file: str = ""
    activated: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def runner(self) -> tuple[str, ...]:
        """How a runner is started: by the package's own file, if this is the package's library."""
        if Path(_PACKAGED).exists() and __file__.startswith("/usr/lib/"):
            return (_PACKAGED,)
        return (self.python, "-P", "-m", "upgrader.run")

    def texts(self, name: str) -> tuple[str, ...]:
        """The command lines of one setting."""
        lines = commands(self.properties.get(f"{name}Ex", ()))
        return tuple(" ".join((line.path, *line.arguments[1:])) for line in lines)


def plan(systemd: Systemd, name: str, options: Sequence[str] = ()) -> Adoption:
    """How a unit would be adopted; `options` are more options of the runner. Raises UnitError."""
    unit = systemd.unit(name)
    path = DROP_IN.format(unit=unit.id)
    if is_runner(unit):
        pending = unit.serves and not look(systemd, unit, patient=False).ours
        return Adoption(unit.id, path, adopted=True, pending=pending)
    if not unit.serves:
        cause = f"it does not serve ({unit.active_state}), so nobody knows what it listens on"
        remedy = f"start it: systemctl start {unit.id}"
        return _refused(unit, AdoptObstacle(ObstacleKind.NOT_SERVING, cause, remedy))
    if look(systemd, unit, patient=False).ours:
        cause = "its program uses the upgrader library, and is upgraded without a runner"
        remedy = f"see: upgrader check {unit.id}"
        return _refused(unit, AdoptObstacle(ObstacleKind.USES_UPGRADER, cause, remedy))
    if limits := turned_away(systemd, unit):
        cause = limits[0].cause.replace("takeover has", "takeover and the runner have")
        return _refused(unit, AdoptObstacle(ObstacleKind.BUS, cause, limits[0].remedy))
    return adoption(facts(systemd, unit), options)


def facts(systemd: Systemd, unit: Unit) -> UnitFacts:
    """All that is known of a unit that serves; raises UnitError."""
    try:
        sockets = open_sockets(systemd.processes(unit))
        executable = os.readlink(f"/proc/{unit.main_pid}/exe") if unit.main_pid else ""
    except PermissionError as error:
        raise AccessDenied(unit.id, "look at its sockets") from error
    except OSError:  # the main process has ended
        executable = ""
    properties = systemd.properties(unit)
    activated: dict[str, str] = {}
    for each in systemd.sockets(unit):
        for kind, address in each.listens:
            if each.active and kind in ("Stream", "Datagram"):
                activated |= dict.fromkeys(_as_open(address), each.name)
    given = as_text(properties.get("PIDFile", ""))
    return UnitFacts(
        unit, properties, sockets, executable, given or _pid_file(unit.main_pid), activated
    )


def adoption(known_facts: UnitFacts, options: Sequence[str] = ()) -> Adoption:
    """How a unit would be adopted, from values alone."""
    unit = known_facts.unit
    refusals = list(_about_unit(known_facts))
    if refusals:
        return _refused(unit, *refusals)
    line = unit.exec_start[-1]
    try:
        found = find(line, known_facts.executable)
    except ValueError as error:
        remedy = "mend that file; see docs/programs.md"
        return _refused(unit, AdoptObstacle(ObstacleKind.COMMAND, str(error), remedy))
    refusals = [*_about_program(found, known_facts.executable), *_about_sockets(known_facts)]
    if refusals:
        return _refused(unit, *refusals, program=found.name)
    listens = named(known_facts)
    names = [each.name for each in listens]
    forking = unit.type == "forking"
    try:
        words = rewritten(found, line, names, forking=forking)
    except NotRewritten as error:
        return _refused(unit, AdoptObstacle(ObstacleKind.COMMAND, str(error)), program=found.name)
    chosen = [*_options(known_facts, found, words), *options]

    def start(trial: str = "") -> str:
        listen = [word for each in listens for word in ("--listen", each.option(trial))]
        mine = [*known_facts.runner, *listen, *chosen]
        return f"ExecStart={prefix(line)}{quoted(mine)} \\\n    -- {quoted(words)}"

    left_alone = tuple(str(each) for each in known_facts.sockets if each.removed)
    return Adoption(
        unit.id,
        DROP_IN.format(unit=unit.id),
        found.name,
        listens,
        tuple("\n".join(_settings(known_facts, found, start())).splitlines()),
        tuple(_costs(known_facts, found)),
        left_alone=left_alone,
        pid_file=known_facts.pid_file,
        start=start(f"/run/{TRIAL}{unit.id}"),
    )


def _refused(unit: Unit, *refusals: AdoptObstacle, program: str = "") -> Adoption:
    return Adoption(unit.id, DROP_IN.format(unit=unit.id), program, refusals=refusals)


def _about_unit(known_facts: UnitFacts) -> Iterator[AdoptObstacle]:
    unit = known_facts.unit
    if unit.type not in _TYPES or not unit.exec_start:
        cause = f"Type={unit.type}: it has no main process that a runner could be"
        if unit.type == "dbus":
            cause = "Type=dbus: two programs cannot own one name on the bus"
        yield AdoptObstacle(ObstacleKind.UNIT_TYPE, cause)
    elif not unit.main_pid:
        cause = "systemd does not know its main process"
        yield AdoptObstacle(
            ObstacleKind.UNIT_TYPE, cause, "set PIDFile= in the unit, and restart it"
        )
    if unit.private_pids not in ("", "no"):
        cause = "PrivatePIDs= hides the old program from the new runner"
        yield AdoptObstacle(ObstacleKind.PRIVATE_PIDS, cause)


def _about_program(found: FoundProgram, executable: str) -> Iterator[AdoptObstacle]:
    if executable.startswith(_SYSTEMD):
        cause = "it is a part of systemd, which others depend on"
        yield AdoptObstacle(ObstacleKind.EXCLUSIVE, cause)
    elif found.program.exclusive:
        cause = f"{found.name} is exclusive: two of it cannot share {found.program.exclusive}"
        yield AdoptObstacle(ObstacleKind.EXCLUSIVE, cause)
    elif found.program.binds:
        cause = f"{found.name} binds its listeners itself, and takes none"
        yield AdoptObstacle(ObstacleKind.BINDS, cause)


def _about_sockets(known_facts: UnitFacts) -> Iterator[AdoptObstacle]:
    streams = [each for each in known_facts.sockets if each.is_stream and not each.removed]
    if not streams:
        yield AdoptObstacle(ObstacleKind.NO_LISTENER, "its processes listen on nothing")
    for each in known_facts.sockets:
        if not each.is_stream:
            yield AdoptObstacle(
                ObstacleKind.DATAGRAMS,
                f"it receives datagrams at {each}, and programs are passed no datagram sockets",
            )


def named(known_facts: UnitFacts) -> tuple[Listened, ...]:
    """The listeners by name; of both families at one port, one."""
    addresses = list(dict.fromkeys(
        each.address for each in known_facts.sockets if each.is_stream and not each.removed
    ))  # fmt: skip
    for address in [each for each in addresses if each not in known_facts.activated]:
        port = address.removeprefix("0.0.0.0:")
        if port != address and (other := f"[::]:{port}") in addresses:
            addresses[addresses.index(address)] = f":{port}"
            addresses.remove(other)
    found: dict[str, Listened] = {}
    for address in addresses:
        if name := known_facts.activated.get(address, ""):
            found[name] = Listened(name, address, passed=True)
            continue
        name = first = _name(address)
        number = 1
        while name in found:
            number += 1
            name = f"{first}-{number}"
        found[name] = Listened(name, address)
    return tuple(found.values())


def _name(address: str) -> str:
    if address.startswith("unix:"):
        stem = os.path.basename(address.removeprefix("unix:")).partition(".sock")[0]
        return re.sub(r"[^A-Za-z0-9-]+", "-", stem).strip("-")[:50] or "socket"
    port = int(address.rpartition(":")[2])
    return _NAMES.get(port, f"port-{port}")


def _options(known_facts: UnitFacts, found: FoundProgram, words: Sequence[str]) -> Iterator[str]:
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


def _settings(known_facts: UnitFacts, found: FoundProgram, start: str) -> Iterator[str]:
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


def _costs(known_facts: UnitFacts, found: FoundProgram) -> Iterator[str]:
    unit, properties = known_facts.unit, known_facts.properties
    waits = "clients wait in the backlog of its .socket units"
    if not known_facts.activated:
        waits = "its listeners are closed and opened again, and clients are refused meanwhile"
    yield f"one restart, the last with a gap: {waits}; connections end"
    memory = f", of {show_bytes(unit.memory_current)} now" if unit.memory_current < UNSET else ""
    yield f"in an upgrade, memory for two of {found.name}{memory}"
    for setting in ("PrivateTmp", "DynamicUser"):
        value = properties.get(setting, False)
        if value and value != "no":
            yield (
                f"with {setting}= a program cannot outlive a stop: at a restart it is drained first, and"
                " clients wait in the backlog"
            )
    for setting in _BEFORE:
        for line in commands(properties.get(f"{setting}Ex", ())):
            tests = line.path == unit.exec_start[-1].path and {*found.program.test} & {
                *line.arguments
            }
            if not tests:  # what a bad configuration leads to, the new program shows
                text = " ".join((line.path, *line.arguments[1:]))
                yield f"{setting}= is run by a start, and not by a live upgrade: {text}"
    for setting in _AFTER:
        for text in known_facts.texts(setting):
            yield f"{setting}= is run by a restart too, while the old {found.name} serves: {text}"
    for each in known_facts.sockets:
        if each.removed:
            yield f"{each} is not passed: {found.name} makes it anew, and renames it into place"
    if not found.known:
        yield (
            f"nothing is known of {found.name}: it is passed its listeners as by a .socket unit, and"
            f" drained by SIGTERM; say more in {DIRECTORY}/"
        )


def _pid_file(pid: int) -> str:
    """The file in which a process has left its number, where such files are."""
    for pattern in ("*.pid", "*/*.pid"):
        for path in sorted(Path("/run").glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                if pid and int(path.read_text(encoding="ascii")) == pid:
                    return str(path)
    return ""


def _as_open(address: str) -> tuple[str, ...]:
    """An address of a `.socket` unit, as `open_sockets` may write it: it depends on BindIPv6Only=."""
    if address.startswith(("/", "@")):
        return (f"unix:{address}",)
    return (address, address.removeprefix("[::]"))
