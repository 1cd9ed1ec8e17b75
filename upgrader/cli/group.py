# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `upgrader` itself, to which the other modules add theirs."""

import click

from upgrader import __version__
from upgrader.cli.output import show, show_document
from upgrader.tool.outcome import ExitCode

EXIT_CODES = {code.value: code.meaning for code in ExitCode}


def _help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        show_document(ctx.get_help())
        ctx.exit()


class Command(click.Command):
    """Shows its help as everything else is shown, whoever reads it."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option, with another callback."""
        option = super().get_help_option(ctx)
        if option:
            option.callback = _help
        return option


class _Group(Command, click.Group):
    """Lists commands in the order in which they were added, and the exit codes below the help."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes, the same on every command"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        show(f"upgrader {__version__}")
        ctx.exit()


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Upgrade systemd services in place, without losing a connection or any state.

    A service that uses the upgrader library gives its sockets, connections and state to its next
    version: directly if both can run side by side, else by way of systemd during a restart. Of any
    other program, a runner gives the listeners to the next version: see `upgrader adopt`.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(cli.commands["list"], names=False, as_json=False, user=False)
