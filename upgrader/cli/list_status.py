# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `list` and `status`, which change nothing."""

import contextlib
import os
import time
from collections.abc import Iterator

import click
import msgspec

from upgrader.cli.group import cli
from upgrader.cli.options import complete_units, json_option, user_option
from upgrader.cli.output import give_up, say, show, show_document, show_json, table
from upgrader.protocol.phase import Phase
from upgrader.protocol.systemd_syntax import show_span
from upgrader.protocol.varlink_types import Backend, Connection, Description, Migration
from upgrader.systemd.unit import UnitError
from upgrader.tool.outcome import ExitCode, Verb, duration
from upgrader.tool.overview import Overview, follow, read, read_all
from upgrader.tool.prometheus import metrics
from upgrader.tool.systemd_client import Systemd

_NAMED = 10  # connections, or changed files, that are named one by one
_WIDTH = 11  # of the names of lines


@cli.command("list", short_help="List the units that use upgrader.")
@click.option("--names", is_flag=True, help="Print only the names of those that serve, one a line.")
@json_option
@user_option
def list_units(names: bool, as_json: bool, user: bool) -> None:
    """List every unit that uses the upgrader library.

    Shows which version runs, whether another one is on disk (because files of the program have
    changed since it was started), how the last upgrade went, and whether the unit has a hold after
    a failed one. `upgrader` without a command does the same.

    \b
    Example:
      upgrader list
      upgrader list --json
    """
    show_list(as_json, names=names, user=user)


def show_list(as_json: bool, *, names: bool = False, user: bool = False) -> None:
    """Print what `upgrader list` shows."""
    try:
        with Systemd(user=user) as systemd:
            units = read_all(systemd)
    except UnitError as error:
        give_up(Verb.LIST, "", error, as_json)
    if as_json:
        show_json(msgspec.json.encode([each.builtins() for each in units]))
    elif names:
        for each in units:
            if each.serves:
                show(each.unit)
    elif units:
        head = ("UNIT", "STATE", "GENERATION", "RUNNING", "ON DISK", "LAST UPGRADE", "HOLD")
        show(*table([head, *(_row(each) for each in units)]))
    else:
        say("no unit in memory uses upgrader; see: upgrader check UNIT")


@cli.command(short_help="Show what a unit runs and holds.")
@click.argument("unit", metavar="UNIT", required=False, shell_complete=complete_units)
@click.option("--watch", is_flag=True, help="Then show each phase of every upgrade as it happens.")
@click.option(
    "--prometheus",
    is_flag=True,
    help="Print metrics for the textfile collector of Prometheus; without UNIT, of all units.",
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="With --prometheus: write them to FILE, which is replaced as a whole.",
)
@json_option
@user_option
def status(
    unit: str | None,
    watch: bool,
    prometheus: bool,
    output: str | None,
    as_json: bool,
    user: bool,
) -> int | None:
    """Show what one unit runs and since when, how it got there, and what it holds.

    Shows versions, generation, backends with their FDs and addresses, parameters, the last upgrade,
    and the hold if it failed. After an upgrade, the old instance may still drain connections that
    could not move: it is listed as draining, with each connection that it waits for.

    Only root, and the service's own user, can ask the instance itself.

    \b
    Example:
      upgrader status web.service
      upgrader status web --watch
      upgrader status --prometheus
    """
    if watch and prometheus:
        raise click.UsageError("--watch and --prometheus cannot be combined")
    if output and not prometheus:
        raise click.UsageError("--output works with --prometheus only")
    if unit is None and not prometheus:
        raise click.UsageError("Missing argument 'UNIT'.")
    try:
        with Systemd(user=user) as systemd:
            if prometheus:
                text = metrics([read(systemd, unit)] if unit else read_all(systemd))
                if output:
                    _replace(output, text)
                else:
                    show_document(text.rstrip())
                return ExitCode.DONE
            found = read(systemd, unit or "")
            if not (watch and as_json):
                if as_json:
                    show_json(found.json())
                else:
                    show(*lines(found))
            if watch and found.uses_upgrader:
                for migration in follow(systemd, found.unit):
                    if as_json:
                        show_json(msgspec.json.encode(migration))
                    else:
                        show(f"{time.strftime('%H:%M:%S')} {_migration(migration)}")
    except UnitError as error:
        give_up(Verb.STATUS, unit or "", error, as_json)
    if not found.serves:
        return ExitCode.NOT_SERVING
    return ExitCode.DONE if found.uses_upgrader else ExitCode.FAILED


def _replace(path: str, text: str) -> None:
    """Write a file that a reader sees whole, as before or as now."""
    beside = f"{path}.{os.getpid()}"  # the collector reads *.prom only
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error


def lines(found: Overview) -> Iterator[str]:
    """Make the lines of `status` for people."""
    state = "serving" if found.serves else "NOT SERVING"
    if not found.uses_upgrader:
        yield f"{found.unit}: {state}, {found.active}; it does not use upgrader"
        return
    instance = found.instance
    since = f" since {_when(instance.since)}" if instance and found.serves else ""
    yield f"{found.unit}: {state}{since}, {found.active}"
    if found.status:
        yield _line("instance", str(found.status))
    elif found.text:
        yield _line("says", found.text)
    if instance:
        version = f"version {instance.version}" if instance.version else "version not said"
        yield _line("running", f"{version}, process {instance.pid}, upgrader {instance.library}")
        yield _line("on disk", _on_disk(instance))
        yield _line("phase", instance.phase + (", an upgrade is due" * instance.expected))
    if found.unreachable:
        yield _line("", f"the instance cannot be asked: {found.unreachable}")
    if instance and instance.migration.mode:
        yield _line("last", _migration(instance.migration))
    yield _line("hold", str(found.hold) if found.hold else "none")
    if found.parked:
        yield _line("kept by", f"systemd: {', '.join(found.parked)}")
    if instance:
        yield from _states(instance)
        yield _line("parameters", " ".join(f"{n}={v!r}" if " " in v else f"{n}={v}" for n, v in
                                            instance.parameters.items()))  # fmt: skip
        if instance.backends:
            rows = [_backend(each) for each in instance.backends]
            head = ("BACKEND", "KIND", "FD", "ADDRESS", "INODE", "CONNECTIONS")
            yield from ("", *table([head, *rows]))
    for old in found.draining:
        yield ""
        left = duration(max(old.drains_until - time.time(), 0))
        until = f", for {left} at most" if old.drains_until else ""
        who = f"generation {old.generation} (process {old.pid})"
        yield f"{who} is draining: {old.connections} open{until}"
        rows = [_connection(each) for each in old.held[:_NAMED]]
        yield from table([("BACKEND", "PEER", "AGE", "DOES"), *rows])
        if old.connections > _NAMED:
            yield f"... and {old.connections - _NAMED} more"


def _states(instance: Description) -> Iterator[str]:
    trials = {trial.name: trial for trial in instance.trials}
    words = []
    for name, version in instance.states.items():
        trial = trials.get(name)
        size = ""
        if trial and not trial.problem:
            size = f", {trial.bytes} bytes saved in {trial.seconds * 1000:.1f} ms"
        words.append(f"{name} (version {version}{size})")
    yield _line("state", ", ".join(words) or "none")
    for trial in instance.trials:
        if trial.problem:
            yield _line("", f"state {trial.name} CANNOT BE SAVED: {trial.problem}")


def _row(found: Overview) -> tuple[str, ...]:
    instance, status = found.instance, found.status
    state = "serving" if found.serves else found.active.partition(" ")[0]
    if found.draining:
        state += f" ({len(found.draining)} draining)"
    on_disk = "?"
    if instance:
        on_disk = "changed" if instance.changed else "same"
    last = "-"
    if instance and instance.migration.mode:
        last = _migration(instance.migration, short=True)
    elif status:
        last = status.origin
    return (
        found.unit,
        state,
        str(status.generation) if status else "-",
        (instance.version if instance else "") or "?",
        on_disk,
        last,
        found.hold.cause if found.hold else "-",
    )


def _on_disk(instance: Description) -> str:
    if instance.reread and not instance.changed:
        return f"the same version, and for the next reload: {', '.join(instance.reread[:_NAMED])}"
    if not instance.changed:
        return "the same version: no file of the program has changed since it was started"
    named = ", ".join(instance.changed[:_NAMED])
    more = f" and {len(instance.changed) - _NAMED} more" if len(instance.changed) > _NAMED else ""
    return f"another version; changed since it was started: {named}{more}"


def _migration(last: Migration, *, short: bool = False) -> str:
    if not last.phase.ended:
        return f"{last.mode}, {last.phase} for {duration(last.seconds)}"
    why = f": {last.reason}" if last.reason else ""
    began = "" if short else f", {_when(last.began)}"
    how = "preflight passed" if last.phase is Phase.PREFLIGHT else last.phase
    text = f"{last.mode} {how}{began}{why}"
    if short or last.phase is not Phase.DONE:
        return text
    return (
        f"{text}: generation {last.source} to {last.destination}, paused"
        f" {last.pause * 1000:.1f} ms, {last.fds} FDs, {last.bytes} bytes,"
        f" {last.left_behind} left behind"
    )


def _backend(each: Backend) -> tuple[str, ...]:
    busy = f" ({each.busy} busy)" if each.busy else ""
    stays = "" if each.transfer else ", do not move"
    number = str(each.fd) if each.fd >= 0 else "-"
    return (
        each.name, each.kind, number, ", ".join(each.addresses) or each.address or "-", str(each.inode),
        f"{each.connections}{busy}{stays}",
    )  # fmt: skip


def _connection(each: Connection) -> tuple[str, ...]:
    return each.backend, each.peer, duration(each.age), each.waiting or each.what or "busy"


def _line(name: str, text: str) -> str:
    return f"{name:>{_WIDTH}}{':' if name else ' '} {text}"


def _when(seconds: float) -> str:
    """Format a point in time, and how long ago it was."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    ago = show_span(float(int(max(time.time() - seconds, 0)))).split()
    return f"{stamp} ({' '.join(ago[:2])} ago)" if ago != ["0"] else f"{stamp} (just now)"
