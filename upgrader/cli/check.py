# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `check`: shows what prevents an upgrade, and writes the drop-in that mends it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from upgrader.cli.group import cli
from upgrader.cli.options import json_option, unit_argument, user_option
from upgrader.cli.output import finish, give_up, say, screen, show_document, show_json
from upgrader.cli.screen import Screen, Tone
from upgrader.tool.outcome import ExitCode, Outcome, Result, Verb
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError

if TYPE_CHECKING:
    from upgrader.tool.check import CheckReport

_RESULTS = {True: Result.OLD_SERVES, False: Result.NOT_SERVING}


@cli.command(short_help="Say what prevents an upgrade.")
@unit_argument
@click.option(
    "--fix",
    is_flag=True,
    help="Write the settings that are missing into a drop-in of the unit, show it, and have systemd"
    " read it. Nothing is restarted.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Check or fix a unit whose program does not use upgrader yet.",
)
@click.option(
    "--preflight",
    is_flag=True,
    help="Also start the version on disk: it loads everything that the running one holds, is checked,"
    " and ends; the running one serves on. This runs the program's own start-up code, with"
    " UPGRADER_PREFLIGHT=1 in its environment.",
)
@json_option
@user_option
def check(
    unit: str, fix: bool, force: bool, preflight: bool, as_json: bool, user: bool
) -> ExitCode:
    """Say whether and how UNIT can be upgraded. Changes nothing without --fix, and with it no unit
    that does not use upgrader.

    A blocker prevents every upgrade, restart-only prevents a live one. A warning names what may
    surprise you: sockets that were not declared, settings that a live upgrade ignores, too little
    room for two instances, what this version of systemd cannot do. Each comes with its remedy.

    The exit code is 0 if the unit can be upgraded live, 1 if not, 3 if it does not serve.

    \b
    Example:
      upgrader check web.service
      upgrader check web --fix
      upgrader check web --preflight
    """
    from upgrader.tool.check import check as run
    from upgrader.tool.check_fix import drop_in
    from upgrader.tool.check_fix import fix as mend

    try:
        with Systemd(user=user) as systemd:
            report = run(systemd, unit, force=force)
            if fix and not report.ours:
                cause = "its program does not use upgrader, as far as can be seen, so nothing was written"
                failed = Outcome.failed(
                    Verb.CHECK, report.unit, _RESULTS[report.serves], cause, _force(report.unit)
                )
                finish(failed, as_json)
            if fix and report.settings:
                path, text = mend(systemd, report)
                for line in (f"{path} is now:", *text.splitlines()):
                    say(line)
                say(f"for settings that need a new start, run: systemctl restart {report.unit}")
                report = run(systemd, unit, force=force)
            if preflight:
                report = run(systemd, unit, preflight=True, force=force)
    except UnitError as error:
        give_up(Verb.CHECK, unit, error, as_json)
    except OSError as error:
        cause = f"cannot write {drop_in(report.unit, user=user)}: {error.strerror}"
        remedy = "run the command as root, with sudo for instance"
        finish(
            Outcome.failed(Verb.CHECK, report.unit, Result.NO_PERMISSION, cause, remedy),
            as_json,
        )
    if as_json:
        show_json(report.json())
        return report.exit_code
    show_document("\n".join(found(screen(), report, force=force)))
    return report.exit_code


def _force(unit: str) -> str:
    return (
        "to see what it would need if its program is about to use upgrader, run:"
        f" upgrader check --force {unit}"
    )


def found(there: Screen, report: "CheckReport", *, force: bool = False) -> Iterator[str]:
    """Make the lines of a report."""
    tone = Tone.GOOD if report.exit_code is ExitCode.DONE else Tone.BAD
    yield there.wrapped("", report.line, tone)
    for finding in report.findings:
        warns = finding.severity is finding.severity.WARNING
        yield there.wrapped(
            f"  {finding.severity}: ", finding.what, Tone.NOTE if warns else Tone.BAD
        )
        if finding.remedy:
            yield there.wrapped("    ", finding.remedy)
    if report.settings:
        fix = f"upgrader check --fix{' --force' * force} {report.unit}"
        yield there.wrapped("", f"to write the missing settings into a drop-in, run: {fix}")
    if not report.ours:
        yield there.wrapped("", _force(report.unit))
