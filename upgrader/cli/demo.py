# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `demo`: starts the lab, which is a package of its own and may not be installed."""

import importlib
from types import ModuleType
from typing import Any

import click

from upgrader.cli.group import cli
from upgrader.cli.options import json_option
from upgrader.cli.output import say, show_document
from upgrader.protocol.parameters import Mode
from upgrader.tool.outcome import ExitCode

#: Loaded by name: no import statement outside the lab names it.
_LAB = "upgrader.lab.demo"


class _NotInstalledError(click.ClickException):
    """The package with the lab is not installed."""

    exit_code = ExitCode.USAGE


def _lab() -> ModuleType:
    """Load the lab; raises _NotInstalledError."""
    try:
        return importlib.import_module(_LAB)
    except ModuleNotFoundError as error:
        if error.name is None or not _LAB.startswith(error.name):
            raise
        raise _NotInstalledError(
            "upgrader demo needs the package upgrader-lab, which is not installed"
            " (Debian: apt-get install upgrader-lab)"
        ) from error


@cli.command(short_help="Show upgrades under load.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode if mode is not Mode.AUTO]),
    default=Mode.LIVE.value,
    show_default=True,
    help="How to upgrade.",
)
@click.option(
    "--upgrades", metavar="N", type=int, default=10, show_default=True, help="How many upgrades."
)
@click.option(
    "--streams", metavar="N", type=int, default=8, show_default=True, help="Long streams to read."
)
@click.option(
    "--connections",
    metavar="N",
    type=int,
    default=0,
    show_default=True,
    help="Idle connections to hold as well.",
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
@click.option(
    "--service",
    type=click.Choice(["web", "qemu"]),
    default="web",
    show_default=True,
    help="What is upgraded: a web service, or the QEMU of a virtual machine.",
)
@json_option
@click.option(
    "--faults",
    is_flag=True,
    help="Instead, play every bad version and every kill point once, and say what each did.",
)
@click.option("--run", "command", metavar="COMMAND", help="Run COMMAND inside, then clean up.")
@click.option("--shell", is_flag=True, help="Open a shell inside, to look around.")
def demo(
    as_json: bool, faults: bool, command: str | None, shell: bool, service: str, **options: Any
) -> int:
    """Upgrade an example service under load, in a private systemd, and count what clients lost.

    Boots a systemd of its own in namespaces (as root; it changes nothing on the machine), starts an
    example web service, loads it with clients, and upgrades it again and again. The exit code is 0
    if nothing was lost, else 1; with --run and --shell it is that of the command.

    \b
    Example:
      upgrader demo
      upgrader demo --connections 5000 --systemd trixie
      upgrader demo --faults --json
      upgrader demo --service qemu
      upgrader demo --run 'upgrader upgrade web.service'
    """
    if service != "web" and (faults or shell or command is not None):
        raise click.UsageError("--faults, --run and --shell are of --service web")
    if faults and options["mode"] != Mode.LIVE:
        raise click.UsageError("--faults works with --mode live only")
    if shell + (as_json or faults) + (command is not None) > 1:
        raise click.UsageError(
            "--run and --shell cannot be combined with each other, --faults or --json"
        )
    lab = _lab()
    try:
        chosen = lab.Options(**options)
    except lab.OptionError as error:
        raise click.UsageError(str(error)) from error
    if command is not None:
        return int(lab.run_inside(chosen, command, say))
    if shell:
        return int(lab.shell(chosen, say))
    if faults:
        rows = lab.run_faults(chosen, say)
        show_document(lab.to_json(rows).decode() if as_json else lab.table(rows))
        return ExitCode.FAILED if any(row.bad for row in rows) else ExitCode.DONE
    report = (lab.run_machine if service == "qemu" else lab.run)(chosen, say)
    show_document(report.json().decode() if as_json else report.table())
    return ExitCode.FAILED if report.lost else ExitCode.DONE
