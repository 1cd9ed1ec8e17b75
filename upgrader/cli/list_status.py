# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `list` and `status`."""

import contextlib
import os
import time

import click
import msgspec

from upgrader.cli.group import cli
from upgrader.cli.options import complete_units, json_option, user_option
from upgrader.cli.output import (
    end_without_reader,
    give_up,
    say,
    screen,
    show,
    show_document,
    show_json,
)
from upgrader.cli.overview_text import listed, shown, watched
from upgrader.tool.outcome import ExitCode, Verb
from upgrader.tool.overview import follow, read, read_all
from upgrader.tool.prometheus import metrics
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError


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
        show_document(listed(screen(), units, time.time()))
        if any(each.unreachable for each in units):
            say("?: its instance could not be asked; upgrader status UNIT says why")
    else:
        say("no unit in memory uses upgrader; see: upgrader check UNIT")


@cli.command(short_help="Show what a unit runs and holds.")
@click.argument("unit", metavar="[UNIT]", required=False, shell_complete=complete_units)
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

    Root and the service's own user see all of that; to others, the instance says nothing of its
    clients, variables and states.

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
            if not as_json:
                show_document("\n".join(shown(screen(), found, time.time())))
            elif not watch:
                show_json(found.json())
            if watch and found.uses_upgrader:
                end_without_reader()
                for migration in follow(systemd, found.unit):
                    if as_json:
                        show_json(msgspec.json.encode(migration))
                    else:
                        show(watched(migration))
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
