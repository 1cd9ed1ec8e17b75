# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print results to standard output, progress and failures to standard error."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from upgrader.systemd.unit import UnitError
from upgrader.tool.outcome import Outcome, Result, Tell, Verb


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Print an outcome, and end with its exit code."""
    if as_json:
        show(outcome.json().decode())
    else:
        tell(outcome)
    raise click.exceptions.Exit(outcome.exit_code)


def tell(outcome: Outcome) -> None:
    """Print an outcome: a success to standard output, a failure with its remedy to standard error."""
    if outcome.result is Result.DONE:
        show(outcome.line)
        return
    say(outcome.line)
    for line in outcome.remedy.splitlines():
        say(f"  {line}")


def give_up(verb: Verb, unit: str, error: UnitError, as_json: bool) -> NoReturn:
    """Print an error about a unit as an outcome, and end with its exit code."""
    finish(Outcome.of_error(verb, unit, error), as_json)


def plain(text: str) -> str:
    """Replace every character that could control a terminal; for text that a service may have written."""
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, as systemctl does."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def progress_to(quiet: bool) -> Tell:
    """Return the function that shows progress."""
    return (lambda text: None) if quiet else say


def say(text: str) -> None:
    """Print a line to standard error. A terminal that is gone is no error: the upgrade goes on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print to standard output. If the reader is gone, the exit code stays what it is."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Otherwise the interpreter would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
