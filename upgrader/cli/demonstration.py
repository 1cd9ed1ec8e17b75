# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `demo`."""

from typing import Any

import click

from upgrader.cli.group import cli
from upgrader.cli.options import json_option
from upgrader.cli.output import say, show
from upgrader.outcome import ExitCode, Mode


@cli.command(short_help="Show upgrades under load.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.LIVE.value,
    show_default=True,
    help="How to upgrade.",
)
@click.option("--upgrades", metavar="N", type=int, default=10, show_default=True, help="How often.")
@click.option(
    "--streams", metavar="N", type=int, default=8, show_default=True, help="Long streams to read."
)
@click.option(
    "--connections",
    metavar="N",
    type=int,
    default=0,
    show_default=True,
    help="Idle connections to hold besides.",
)
@click.option("--user", metavar="NAME", help="Run the example service as this user.")
@click.option(
    "--systemd",
    metavar="WHICH",
    default="host",
    show_default=True,
    help="The systemd to boot: host (of this machine), a Debian suite such as trixie or sid"
    " (downloaded once), or the path of a root tree.",
)
@json_option
@click.option(
    "--faults",
    is_flag=True,
    help="Play every bad version and every kill point once instead, and say what each did.",
)
@click.option("--run", "command", metavar="COMMAND", help="Run COMMAND inside, then clean up.")
@click.option("--shell", is_flag=True, help="Give a shell inside, to look around.")
def demo(as_json: bool, faults: bool, command: str | None, shell: bool, **options: Any) -> int:
    """Show it: upgrade an example service under load, in a private systemd.

    Boots a systemd of its own in namespaces (as root; nothing of the machine is touched), starts
    an example web service, loads it with clients, upgrades it again and again, and counts what
    was lost. The exit code is 0 only if nothing was, and else 1; that of --run and --shell is the
    command's.

    \b
    Example:
      upgrader demo
      upgrader demo --connections 5000 --systemd trixie
      upgrader demo --faults --json
      upgrader demo --run 'upgrader upgrade web.service'
    """
    from upgrader import demo as demonstration

    if faults and options["mode"] != Mode.LIVE:
        raise click.UsageError("--faults are those of live mode")
    if shell + (as_json or faults) + (command is not None) > 1:
        raise click.UsageError("--run and --shell exclude each other, --faults and --json")
    try:
        chosen = demonstration.Options(**options)
    except demonstration.OptionError as error:
        raise click.UsageError(str(error)) from error
    if command is not None:
        return demonstration.run_inside(chosen, command, say)
    if shell:
        return demonstration.shell(chosen, say)
    if faults:
        rows = demonstration.run_faults(chosen, say)
        show(demonstration.to_json(rows).decode() if as_json else demonstration.table(rows))
        return ExitCode.FAILED if any(row.bad for row in rows) else ExitCode.DONE
    report = demonstration.run(chosen, say)
    show(report.json().decode() if as_json else report.table())
    return ExitCode.FAILED if report.lost else ExitCode.DONE
