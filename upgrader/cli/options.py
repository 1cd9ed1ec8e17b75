# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments and options that several commands share, each with its one text."""

from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from upgrader.parameters import SETTABLE, time_span
from upgrader.systemd.unit import UnitError
from upgrader.systemd.units import Systemd


class TimeSpan(click.ParamType):  # type: ignore[type-arg]  # a generic from click 8.2 on
    """A time to wait, as systemd writes it; not none at all."""

    name = "span"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds; fails with wrong usage."""
        if isinstance(value, float):
            return value
        try:
            seconds = time_span(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds <= 0:
            self.fail(f"{value!r} is no time to wait; write it as 5s or 1min 30s", param, ctx)
        return seconds


def complete_units(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of units in memory, for the shell; none where PID 1 cannot be asked."""
    try:
        with Systemd(user=bool(ctx.params.get("user"))) as systemd:
            names = systemd.services()
    except UnitError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_parameters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of parameters, for the shell."""
    return [f"{name}=" for name in SETTABLE if name.startswith(incomplete)]


def assigned(assignments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, several times; raises UsageError."""
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
    help="How long to wait for the new instance: 5s, 500ms, 1min 30s. After that systemd goes on"
    " with the job, unobserved. Default: as long as TimeoutStopSec= and TimeoutStartSec= of the"
    " unit allow.",
)
user_option = click.option(
    "--user", is_flag=True, help="Talk to your own service manager, not to that of the system."
)
