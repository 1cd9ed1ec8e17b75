# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arguments and options that several commands share."""

from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from upgrader.protocol.parameters import SETTABLE
from upgrader.protocol.systemd_syntax import time_span
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError


class TimeSpan(click.ParamType):  # type: ignore[type-arg]  # a generic from click 8.2 on
    """A time to wait, longer than 0, written as in systemd."""

    name = "span"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert to seconds; a wrong value is wrong usage."""
        if isinstance(value, float):
            return value
        try:
            seconds = time_span(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds <= 0:
            self.fail(f"{value!r} is not a time to wait; write it as 5s or 1min 30s", param, ctx)
        return seconds


def complete_units(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of units in memory; offers none if PID 1 cannot be asked."""
    try:
        with Systemd(user=bool(ctx.params.get("user"))) as systemd:
            names = systemd.services()
    except UnitError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_parameters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of parameters."""
    return [f"{name}=" for name in SETTABLE if name.startswith(incomplete)]


def assigned(assignments: Sequence[str]) -> dict[str, str]:
    """Split arguments of the form NAME=VALUE; raises UsageError."""
    values = {}
    for each in assignments:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{each!r} is not NAME=VALUE")
        values[name] = value
    return values


unit_argument = click.argument("unit", metavar="UNIT", shell_complete=complete_units)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
timeout_option = click.option(
    "--timeout",
    type=TimeSpan(),
    metavar="SPAN",
    help="How long to wait for the new instance: 5s, 500ms, 1min 30s. After that the command gives"
    " up, and systemd goes on with the job. Default: as long as TimeoutStopSec= and"
    " TimeoutStartSec= of the unit allow.",
)
user_option = click.option(
    "--user", is_flag=True, help="Ask your own systemd, not that of the system."
)
