# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `adopt`: shows, writes and removes the drop-in by which a unit gets a runner."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from upgrader.cli.group import cli
from upgrader.cli.options import json_option, unit_argument
from upgrader.cli.output import finish, give_up, say, screen, show_document, show_json
from upgrader.cli.screen import Screen, Tone
from upgrader.tool.outcome import ExitCode, Outcome, Result, Verb
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError

if TYPE_CHECKING:
    from pathlib import Path

    from upgrader.tool.adopt import Adoption

_RESTART = "It is in force from the next start on: systemctl restart {}"


@cli.command(short_help="Have a program that knows nothing of upgrader upgraded live.")
@unit_argument
@click.argument("options", metavar="[-- RUNNER OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--write",
    is_flag=True,
    help="Start the program once behind a runner, beside the one that serves, in the sandbox of the"
    " unit, and write the drop-in if it takes its listeners there. Nothing is restarted.",
)
@click.option(
    "--untried",
    is_flag=True,
    help="With --write: write it without that start, for a program that needs the network then.",
)
@click.option("--undo", is_flag=True, help="Remove the drop-in again. Nothing is restarted.")
@json_option
def adopt(
    unit: str, options: tuple[str, ...], write: bool, untried: bool, undo: bool, as_json: bool
) -> ExitCode:
    """Make a runner the main process of UNIT, whose program needs no line of code for that.

    Shows the drop-in that does it, what it costs, or why it cannot be, and changes nothing without
    --write. What the unit runs and listens on is read from systemd and from its processes, so it has
    to serve. From the restart after that on, upgrades of the program are live. RUNNER OPTIONS are
    those of `python -m upgrader.run`, such as --check.

    \b
    Example:
      upgrader adopt nginx.service
      upgrader adopt --write nginx
      upgrader adopt --write web -- --check 'curl -sf http://localhost/'
    """
    from upgrader.tool.adopt import plan
    from upgrader.tool.adopt_trial import try_out
    from upgrader.tool.adopt_write import undo as remove
    from upgrader.tool.adopt_write import write as put

    if (write and undo) or (untried and not write) or (undo and options):
        raise click.UsageError("--undo stands alone, and --untried goes with --write")
    try:
        with Systemd() as systemd:
            if undo:
                finish(_undone(*remove(systemd, unit)), as_json)
            found = plan(systemd, unit, options)
            if write and found.lines:
                tried = None if untried else try_out(systemd, systemd.unit(unit), found, say)
                if refusal := tried or put(systemd, found):
                    found = found.refused(refusal)
            serves = systemd.unit(unit).serves
    except UnitError as error:
        give_up(Verb.ADOPT, unit, error, as_json)
    except OSError as error:
        cause = f"{error.filename}: {error.strerror}"
        remedy = "run the command as root, with sudo for instance"
        finish(Outcome.failed(Verb.ADOPT, unit, Result.NO_PERMISSION, cause, remedy), as_json)
    written = write and bool(found.lines)
    if as_json:
        show_json(found.json(written=written))
    else:
        show_document("\n".join(shown(screen(), found, written=written, untried=untried)))
    if found.refusals:
        return ExitCode.FAILED if serves else ExitCode.NOT_SERVING
    return ExitCode.DONE


def _undone(unit: str, path: "Path", found: bool) -> Outcome:
    text = f"there is no {path}: nothing to undo"
    if found:
        text = f"{path} is removed; to go back to the plain program: systemctl restart {unit}"
    return Outcome.done(Verb.ADOPT, unit, text)


def shown(
    there: Screen, found: "Adoption", *, written: bool = False, untried: bool = False
) -> Iterator[str]:
    """Make the lines of what adopting a unit does, or has done."""
    if found.adopted:
        line = f"{found.unit}: its main process is a runner by its unit, there is nothing to adopt"
        yield there.wrapped("", line, Tone.GOOD)
        if found.pending:
            yield there.wrapped("", _RESTART.format(found.unit))
        return
    for refusal in found.refusals:
        line = f"{found.unit}: cannot be adopted ({refusal.kind}): {refusal.cause}"
        yield there.wrapped("", line, Tone.BAD)
        if refusal.remedy:
            yield there.wrapped("  ", refusal.remedy)
    if found.refusals:
        return
    if written:
        tried = "is adopted, untried" if untried else "was tried behind a runner"
        yield there.wrapped("", f"{found.unit}: {found.program} {tried}", Tone.GOOD)
        yield there.wrapped("", f"{found.path} is now:")
    else:
        yield there.wrapped("", f"{found.unit}: {found.program} can be adopted", Tone.GOOD)
        yield there.wrapped("", f"{found.path} would be:")
    yield from (f"    {line}".rstrip() for line in found.lines)
    yield "What it costs:"
    for cost in found.costs:
        yield there.wrapped("  - ", cost)
    if written:
        yield there.wrapped("", _RESTART.format(found.unit))
    else:
        yield there.wrapped("", f"To try and write it, run: upgrader adopt --write {found.unit}")
