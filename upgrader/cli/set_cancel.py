# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `set` and `cancel`, which ask the instance that serves."""

import click

from upgrader.cli.group import Command, cli
from upgrader.cli.options import (
    assigned,
    complete_parameters,
    json_option,
    unit_argument,
    user_option,
)
from upgrader.cli.output import finish
from upgrader.protocol.parameters import SETTABLE


class _Set(Command):
    """Adds the list of parameters to the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Parameters"):
            formatter.write_dl([(name, each.text) for name, each in SETTABLE.items()])


@cli.command("set", cls=_Set, short_help="Set parameters of a running unit.")
@unit_argument
@click.argument(
    "assignments",
    metavar="NAME=VALUE...",
    nargs=-1,
    required=True,
    shell_complete=complete_parameters,
)
@json_option
@user_option
def set_(unit: str, assignments: tuple[str, ...], as_json: bool, user: bool) -> None:
    """Set parameters of UNIT until it is stopped; later instances inherit them in an upgrade.

    If one value is wrong, none is set. NAME= without a value goes back to what the unit says. To set
    a parameter for good, put it into the environment of the unit (systemctl edit UNIT), for example
    Environment=UPGRADER_DRAIN_TIMEOUT=30s. Time spans are written as in systemd: 5s, 1min 30s.

    \b
    Example:
      upgrader set web.service drain-timeout=1min
      upgrader set web backend-transfer.admin=no downtime-limit=
    """
    from upgrader.tool.set_and_cancel import set_parameters

    finish(set_parameters(unit, assigned(assignments), user=user), as_json)


@cli.command(short_help="Call off the upgrade under way.")
@unit_argument
@json_option
@user_option
def cancel(unit: str, as_json: bool, user: bool) -> None:
    """Call off the upgrade of UNIT that is under way: the old instance serves on.

    This works in live mode, until the new instance has taken over. Nothing is lost: the old instance
    goes on as if nothing had happened. The command that waits for the upgrade reports a failure.

    \b
    Example:
      upgrader cancel web.service
    """
    from upgrader.tool.set_and_cancel import cancel as run

    finish(run(unit, user=user), as_json)
