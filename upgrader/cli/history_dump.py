# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `history` and `dump`."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from upgrader.cli.group import cli
from upgrader.cli.options import complete_units, json_option, unit_argument, user_option
from upgrader.cli.output import finish, give_up, screen, show_document, show_json
from upgrader.cli.screen import Cell, Screen, Tone
from upgrader.errors import UpgradeError
from upgrader.protocol.wording import counted, show_bytes, show_duration
from upgrader.tool.history import PastResult, PastUpgrade, encode, read, upgrades
from upgrader.tool.outcome import ExitCode, Outcome, Result, Verb
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import UnitError

if TYPE_CHECKING:
    from upgrader.tool.dump_image import Dump

_ENTRIES = 4  # of one upgrade, at most: what is known of more was cut off


@cli.command(short_help="Show the past upgrades of a unit.")
@unit_argument
@click.option(
    "-n", "--lines", metavar="N", type=click.IntRange(1, 10000), default=50, show_default=True,
    help="How many of the newest upgrades.",
)  # fmt: skip
@click.option("--svg", is_flag=True, help="Print a picture: one row for each upgrade, its phases.")
@json_option
@user_option
def history(unit: str, lines: int, svg: bool, as_json: bool, user: bool) -> ExitCode:
    """Show the past upgrades of UNIT from the journal: when, how, and how long nobody served.

    One line for each upgrade, preflight and cold start. The journal has entries of the old instance
    (source), of the new one (destination), and of takeover, which starts the new one: --json prints
    them, and journalctl finds them by UPGRADER_UNIT=.

    \b
    Example:
      upgrader history web.service
      upgrader history web --svg > web.svg
    """
    if svg and as_json:
        raise click.UsageError("--svg and --json cannot be combined")
    try:
        with Systemd(user=user) as systemd:
            found = systemd.unit(unit)
    except UnitError as error:
        give_up(Verb.HISTORY, unit, error, as_json)
    past = upgrades(read(found, lines * _ENTRIES, user=user))[-lines:]
    if not past:
        _nothing(found.id, as_json)
    if svg:
        from upgrader.tool.history_svg import plot

        show_document(plot(found.id, past).rstrip())
    elif as_json:
        show_json(encode([event for each in past for event in each.events]))
    else:
        show_document(recounted(screen(), past))
    return ExitCode.DONE


def recounted(there: Screen, past: Sequence[PastUpgrade]) -> str:
    """Make the table of `history`."""
    head = ("TIME", "KIND", "GENERATION", "RESULT", "TOOK", "PAUSE", "WHAT")
    rows = [_row(there, each) for each in past]
    return there.table(head, rows, spare=("TOOK", "GENERATION", "PAUSE"))


def _row(there: Screen, each: PastUpgrade) -> Sequence[str | Cell]:
    failed = each.result is PastResult.FAILED
    what = each.reason
    if each.result is PastResult.DONE and each.source:
        what = f"{counted(each.fds, 'FD')}, {show_bytes(each.bytes)}"
        what += f", {each.left_behind} left behind" if each.left_behind else ""
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)),
        each.kind,
        each.generations(there.arrow) or "-",
        Cell(each.result, Tone.BAD if failed else Tone.NONE),
        show_duration(each.seconds) if each.seconds else "-",
        show_duration(each.pause) if each.pause else "-",
        what,
    )


def _nothing(unit: str, as_json: bool) -> None:
    if os.geteuid() != 0:
        result, cause = Result.NO_PERMISSION, "the journal shows this user no entry of it"
        remedy = "run the command as root, with sudo for instance"
    else:
        result, cause = (
            Result.OLD_SERVES,
            "the journal has no entry of it: it does not use upgrader",
        )
        remedy = f"look at its own entries: journalctl -u {unit}"
    finish(Outcome.failed(Verb.HISTORY, unit, result, cause, remedy), as_json)


@cli.command(short_help="Show what is in an image.")
@click.argument("target", metavar="UNIT|FILE", shell_complete=complete_units)
@json_option
@user_option
def dump(target: str, as_json: bool, user: bool) -> ExitCode:
    """Show what is in the images that systemd holds for UNIT, or in the image in FILE.

    Shows names, versions and sizes of states, backends, and what was left behind; never the state
    itself, which may be secret. The image stays as it is: the next start loads it. For a service
    that serves, systemd holds at most its insurance and images that were set aside.

    FILE is a path with a slash in it. UNIT needs root, and systemd 254 or later.

    \b
    Example:
      upgrader dump web.service
      upgrader dump ./image.bin --json
    """
    from upgrader.tool.dump_image import DumpError, NotAllowed, of_file, of_unit

    unit = "" if "/" in target else target
    result = Result.USAGE
    try:
        if not unit:
            found = [of_file(target)]
        else:
            with Systemd(user=user) as systemd:
                there = systemd.unit(unit)
                unit = there.id
                result = Result.OLD_SERVES if there.serves else Result.NOT_SERVING
                found = of_unit(systemd, there)
            if not found:
                raise DumpError(
                    "systemd holds no image for it: it does not use upgrader, or serves"
                )
    except UnitError as error:
        give_up(Verb.DUMP, unit, error, as_json)
    except UpgradeError as error:
        if isinstance(error, NotAllowed):
            result = Result.NO_PERMISSION
        outcome = Outcome.failed(Verb.DUMP, unit, result, error.message, error.remedy)
        finish(outcome, as_json)
    if as_json:
        show_json(msgspec.json.encode(found))
    else:
        here = screen()
        show_document("\n\n".join("\n".join(_image(here, each)) for each in found))
    return ExitCode.DONE


def _image(there: Screen, each: "Dump") -> Iterator[str]:
    version = f" (version {each.program})" if each.program else ""
    size = show_bytes(each.bytes)
    what = f"{each.where}: generation {each.generation} of {each.service}{version}, {size}"
    yield there.wrapped("", what)
    rows = [
        (s.name, str(s.version), str(s.readable_from), show_bytes(s.bytes)) for s in each.states
    ]
    yield there.table(("STATE", "VERSION", "READABLE FROM", "SIZE"), rows)
    rows = [(e["backend"], e["kind"], str(e["count"]), e["address"] or "-") for e in each.entries]
    yield there.table(("BACKEND", "KIND", "COUNT", "ADDRESS"), rows)
    for left in each.left_behind:
        yield there.wrapped(
            "left behind: ", f"{left['what']} of {left['backend']}: {left['why']}", Tone.NOTE
        )
    if each.parameters:
        words = " ".join(f"{name}={value}" for name, value in each.parameters.items())
        yield there.wrapped("set: ", words)
