# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plan how an ordinary unit gets a runner as its main process: the drop-in, what it costs, or why not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from upgrader.protocol.programs import DIRECTORY
from upgrader.protocol.wording import show_bytes
from upgrader.systemd.live_limits import is_runner
from upgrader.systemd.unit import UNSET, Unit, commands
from upgrader.tool.adopt_command import FoundProgram, NotRewritten, find, rewritten
from upgrader.tool.adopt_drop_in import DROP_IN, own_options, settings, start_line
from upgrader.tool.adopt_facts import Listened, UnitFacts, facts, named
from upgrader.tool.live_mode import turned_away
from upgrader.tool.presence import look
from upgrader.tool.systemd_client import Systemd

#: Before the name of a unit: that of its trial, and of its directory in /run.
TRIAL = "upgrader-trial-"
_SYSTEMD = ("/usr/lib/systemd/", "/lib/systemd/")
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
    INTERFACE = "interface"  #: a listener is bound to one interface
    UNIT_FILES = "unit-files"  #: systemd has not read them, or they undo what a drop-in sets
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


def plan(systemd: Systemd, name: str, options: Sequence[str] = ()) -> Adoption:
    """How a unit would be adopted; `options` are more options of the runner. Raises UnitError."""
    unit = systemd.unit(name)
    path = DROP_IN.format(unit=unit.id)
    if is_runner(unit):
        pending = unit.serves and not look(systemd, unit, patient=False).ours
        return Adoption(unit.id, path, adopted=True, pending=pending)
    if unit.need_daemon_reload:
        cause = "its unit files have changed since systemd has read them"
        obstacle = AdoptObstacle(ObstacleKind.UNIT_FILES, cause, "run: systemctl daemon-reload")
        return _refused(unit, obstacle)
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
    more = (*own_options(known_facts, found, words), *options)

    def start(trial: str = "") -> str:
        listen = [word for each in listens for word in ("--listen", each.option(trial))]
        for each in listens:
            listen += ("--socket-mode", f"{each.name}={each.mode}") if each.mode else ()
        return start_line(known_facts, (*listen, *more), words)

    left_alone = tuple(str(each) for each in known_facts.sockets if each.removed)
    return Adoption(
        unit.id,
        DROP_IN.format(unit=unit.id),
        found.name,
        listens,
        tuple("\n".join(settings(known_facts, found, start())).splitlines()),
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
        if each.interface and each.is_stream and each.address not in known_facts.activated:
            yield AdoptObstacle(
                ObstacleKind.INTERFACE,
                f"{each} is bound to {each.interface}, and a runner would listen on all interfaces",
                "have a .socket unit with BindToDevice= listen there",
            )
        if not each.is_stream:
            yield AdoptObstacle(
                ObstacleKind.DATAGRAMS,
                f"it receives datagrams at {each}, and programs are passed no datagram sockets",
            )


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
