# SPDX-License-Identifier: LGPL-2.1-or-later
"""Show for people what is known of a unit: the texts of `list` and `status`."""

import time
from collections.abc import Iterator, Sequence

import msgspec

from upgrader.cli.screen import Cell, Screen, Tone
from upgrader.protocol.kinds import Kind, Standing
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink_types import (
    Backend,
    Connection,
    Description,
    Migration,
    ReplayCounts,
)
from upgrader.protocol.wording import counted, show_age, show_bytes, show_duration, show_time
from upgrader.tool.credentials import show_stale
from upgrader.tool.deleted_program import show_deleted
from upgrader.tool.hold import Hold, HoldKind
from upgrader.tool.overview import Overview
from upgrader.tool.plain_text import plain

_NAMED = 10  # connections, or changed files, that are named one by one
_WIDTH = 11  # of the names of lines
_SOCKETS = frozenset(Kind)
_USUAL = "active (running)"
_BACKENDS = ("BACKEND", "KIND", "FD", "ADDRESS", "INODE", "CONNECTIONS")
_OTHERS = ("BACKEND", "KIND", "FD", "WHAT", "SIZE", "VERIFIED")
_PEERS = ("BACKEND", "PEER", "AGE", "DOES")

#: By the memory in which secrets cross.
_TLS = {
    "secret": "open connections move, their secrets in memory of their own",
    "ordinary": "open connections move, their secrets in memory that may be swapped out",
}

#: The name of a line, its text, and what that means.
_Line = tuple[str, str, Tone]


# A row of `list`


def listed(there: Screen, units: Sequence[Overview], now: float) -> str:
    """Make the table of `list`; `now`: in seconds of the Unix epoch."""
    head = ("UNIT", "STATE", "VERSION", "ON DISK", "LAST UPGRADE", "HOLD")
    return there.table(head, [_row(each, now) for each in units], spare=("VERSION", "ON DISK"))


def _row(found: Overview, now: float) -> tuple[str | Cell, ...]:
    instance = found.instance
    state = Cell("serving", Tone.GOOD)
    if found.draining:
        state = Cell(f"serving +{len(found.draining)} draining", Tone.NOTE)
    if not found.serves:
        state = Cell(found.active.partition(" ")[0], Tone.BAD)
    on_disk = Cell("?")
    if instance:
        on_disk = Cell("changed", Tone.NOTE) if instance.changed else Cell("same")
    version = (instance.version if instance else "") or "?"
    return found.unit, state, version, on_disk, _last(found, now), _hold(found.hold)


def _last(found: Overview, now: float) -> Cell:
    last, under_way = found.last_upgrade, found.instance.migration if found.instance else None
    if under_way and not under_way.phase.ended:
        return Cell(f"{_name(under_way)}, {under_way.phase}", Tone.NOTE)
    if not last.mode:
        return Cell("-")
    ago = show_age(now - last.began, brief=True)
    return Cell(f"{last.phase} {ago}, {last.mode}", _tone(last))


def _hold(hold: Hold | None) -> Cell:
    if hold is None:
        return Cell("-")
    by = "by an admin: " if hold.kind is HoldKind.ADMIN else ""
    return Cell(by + hold.cause, Tone.NOTE)


# The lines of `status`


def shown(there: Screen, found: Overview, now: float) -> Iterator[str]:
    """Make the lines of `status`; `now`: in seconds of the Unix epoch."""
    instance = found.instance
    state, tone = ("serving", Tone.GOOD) if found.serves else ("NOT SERVING", Tone.BAD)
    since = f" since {_when(instance.since, now)}" if instance and found.serves else ""
    if not found.serves or found.active != _USUAL:
        since += f", {found.active}"
    foreign = "" if found.uses_upgrader else "; it does not use upgrader"
    yield f"{plain(found.unit)}: {there.paint(state, tone)}{plain(since)}{foreign}"
    if foreign:
        return
    for name, text, meaning in _lines(found, now):
        yield there.wrapped(f"{name:>{_WIDTH}}{':' if name else ' '} ", text, meaning)
    backends = instance.backends if instance else []
    if sockets := [each for each in backends if each.kind in _SOCKETS]:
        yield "\n" + there.table(_BACKENDS, [_socket(each) for each in sockets])
    if others := [each for each in backends if each.kind not in _SOCKETS]:
        yield "\n" + there.table(_OTHERS, [_other(each) for each in others])
    for old in found.draining:
        yield "\n" + there.wrapped("", _draining(old, now), Tone.NOTE)
        yield there.table(_PEERS, [_connection(each) for each in old.held[:_NAMED]])
        if old.connections > _NAMED:
            yield f"{there.ellipsis} and {old.connections - _NAMED} more"


def _lines(found: Overview, now: float) -> Iterator[_Line]:
    instance = found.instance
    if found.status:
        # Why an upgrade has failed is told by the lines about upgrades.
        yield "instance", str(found.status.replace(refused="")), Tone.NONE
        if stayed := instance.loaded.stayed if instance else {}:
            counts = (f"{count} because {plain(why)}" for why, count in stayed.items())
            yield "", f"left behind: {'; '.join(counts)}", Tone.NONE
    elif found.text:
        yield "says", found.text, Tone.NONE
    if instance:
        version = f"version {instance.version}" if instance.version else "version not said"
        process = f"process {instance.pid}, upgrader {instance.library}"
        yield "running", f"{version}, {process}", Tone.NONE
        if instance.programs:
            yield "program", _programs(instance), Tone.NONE
        yield _on_disk(instance)
        held = found.hold.kind if found.hold else None
        if deleted := show_deleted(found.unit, instance, held):
            yield "", deleted, Tone.NOTE
        if found.stale:
            yield "stale", show_stale(found.unit, found.stale), Tone.NOTE
        if instance.phase != Standing.SERVING or instance.expected:
            due = ", an upgrade is due" * instance.expected
            yield "phase", f"{instance.phase}{due}", Tone.NONE
    if instance and instance.partial:
        yield "", "this is what everybody may know; root is told more", Tone.NONE
    if found.unreachable:
        yield "", f"the instance cannot be asked: {found.unreachable}", Tone.NOTE
    yield from _upgrades(found, now)
    if found.parked:
        yield "kept by", f"systemd: {', '.join(found.parked)}", Tone.NONE
    if instance:
        yield from _states(instance)
        if handlers := _replays(instance.replays):
            yield "handlers", handlers, Tone.NONE
        if instance.tls_memory:
            yield "TLS", _TLS.get(instance.tls_memory, instance.tls_memory), Tone.NONE
        yield "parameters", _parameters(instance), Tone.NONE


def _replays(counts: ReplayCounts) -> str:
    """What has become of the handlers of WebSockets that have moved here."""
    words = [f"{counts.moved} began anew"] if counts.moved else []
    words += [f"still to begin: {counts.waiting}"] if counts.waiting else []
    words += (
        [f"failed, so that their clients dial again: {counts.refused}"] if counts.refused else []
    )
    return "; ".join(words)


def _programs(instance: Description) -> str:
    """Those of a runner: which one serves, and which are drained."""
    words = []
    for each in instance.programs:
        size = f", {show_bytes(each.memory)}" if each.memory else ""
        many = "1 process" if each.processes == 1 else f"{each.processes} processes"
        does = "drains" if each.replaced else "serves"
        offers = f", offers {', '.join(map(plain, each.offers))}" if each.offers else ""
        words.append(f"process {each.pid} {does} ({many}{size}{offers})")
    return "; ".join(words)


def _on_disk(instance: Description) -> _Line:
    if instance.reread and not instance.changed:
        anew = ", ".join(instance.reread[:_NAMED])
        return "on disk", f"the same version, and for the next reload: {anew}", Tone.NONE
    if not instance.changed:
        same = "the same version: no file of the program has changed since it was started"
        return "on disk", same, Tone.NONE
    named = ", ".join(instance.changed[:_NAMED])
    more = f" and {len(instance.changed) - _NAMED} more" if len(instance.changed) > _NAMED else ""
    other = f"another version; changed since it was started: {named}{more}"
    return "on disk", other, Tone.NOTE


def _upgrades(found: Overview, now: float) -> Iterator[_Line]:
    """What is under way, or was last; the last upgrade, if that is another one; and the hold."""
    hold, last = found.hold, found.last_upgrade
    newest = found.instance.migration if found.instance else Migration()
    if last.mode:
        # The hold has the same reason.
        known = hold is not None and hold.cause == last.reason
        told = msgspec.structs.replace(last, reason="") if known else last
        # So has the instance, if it came by this upgrade.
        came = found.status is not None and found.status.generation == last.destination
        yield "last", _migration(told, now, brief=came), _tone(last)
    if newest.mode and newest.began > last.began:
        yield "then" if newest.phase.ended else "now", _migration(newest, now), _tone(newest)
    if hold:
        yield "hold", str(hold), Tone.NOTE
    else:
        yield "hold", "none", Tone.NONE


def _states(instance: Description) -> Iterator[_Line]:
    trials = {trial.name: trial for trial in instance.trials}
    words = []
    for name, version in instance.states.items():
        trial = trials.get(name)
        size = ""
        if trial and not trial.problem:
            size = f", {show_bytes(trial.bytes)} saved in {show_duration(trial.seconds)}"
        words.append(f"{name} (version {version}{size})")
    yield "state", ", ".join(words) or "none", Tone.NONE
    for trial in instance.trials:
        if trial.problem:
            yield "", f"state {trial.name} CANNOT BE SAVED: {trial.problem}", Tone.BAD
        elif trial.unreadable:
            yield "", f"state {trial.name} COULD NOT BE LOADED AGAIN: {trial.unreadable}", Tone.BAD


def _parameters(instance: Description) -> str:
    """Those that differ from their defaults."""
    usual = Parameters().shown()
    words = [
        f"{name}={value!r}" if " " in value else f"{name}={value}"
        for name, value in instance.parameters.items()
        if value != usual.get(name)
    ]
    return " ".join(words) or "all have their defaults"


def _draining(old: Description, now: float) -> str:
    text = f"generation {old.generation} (process {old.pid}) is draining: {old.connections} open"
    if old.drains_until:
        text += f", for {show_duration(max(old.drains_until - now, 0))} at most"
    if old.replays.suspended:
        text += f"; handlers whose connections have moved: {old.replays.suspended}"
    if old.replays.lost:
        text += f", with {counted(old.replays.lost, 'message')} that nobody gets"
    return text


def _other(each: Backend) -> tuple[str, ...]:
    stays = "" if each.transfer else "does not move"
    return (
        each.name, each.kind, str(each.fd) if each.fd >= 0 else "-", each.text or "-",
        show_bytes(each.size) if each.size else "-",
        stays or ", ".join(each.verified) or "-",
    )  # fmt: skip


def _socket(each: Backend) -> tuple[str, ...]:
    busy = f" ({each.busy} busy)" if each.busy else ""
    stays = "" if each.transfer else ", do not move"
    number = str(each.fd) if each.fd >= 0 else "-"
    return (
        each.name, each.kind, number, ", ".join(each.addresses) or each.address or "-",
        str(each.inode),
        f"{each.connections}{busy}{stays}",
    )  # fmt: skip


def _connection(each: Connection) -> Sequence[str]:
    return each.backend, each.peer, show_duration(each.age), each.waiting or each.what or "busy"


# Migrations


def watched(migration: Migration) -> str:
    """Make the line of a phase that has just begun."""
    return f"{time.strftime('%H:%M:%S')} {_migration(migration)}"


def _migration(each: Migration, now: float | None = None, *, brief: bool = False) -> str:
    """Describe a migration; with `now`, also when it began; if `brief`, without what it moved."""
    if not each.phase.ended:
        text = f"{_name(each)}, {each.phase} for {show_duration(each.seconds)}"
        if each.round:
            text += (
                f": round {each.round} of its tables, {show_bytes(each.copied)} copied,"
                f" {show_bytes(each.left)} left"
            )
        return text
    how = "passed" if each.phase is Phase.PREFLIGHT else each.phase
    text = f"{_name(each)} {how}"
    if now is not None:
        text += f", {_when(each.began, now)}"
    if each.reason and each.phase is not Phase.PREFLIGHT:
        text += f": {each.reason}"
    if each.phase is not Phase.DONE or brief:
        return text
    return (
        f"{text}: generation {each.source} to {each.destination}, paused"
        f" {show_duration(each.pause)}, {counted(each.fds, 'FD')}, {show_bytes(each.bytes)},"
        f" {each.left_behind} left behind"
    )


def _name(each: Migration) -> str:
    return "preflight" if each.preflight or each.phase is Phase.PREFLIGHT else each.mode


def _tone(each: Migration) -> Tone:
    return Tone.BAD if each.phase is Phase.FAILED else Tone.NONE


def _when(seconds: float, now: float) -> str:
    return f"{show_time(seconds)}; {show_age(now - seconds)}"
