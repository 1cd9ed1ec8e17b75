# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the command line prints: results to standard output, progress and failures to standard error."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from upgrader.outcome import Outcome, Progress, Result, Verb
from upgrader.systemd.unit import UnitError


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Print what became of it, and end with its exit code."""
    if as_json:
        show(outcome.json().decode())
    else:
        tell(outcome)
    raise click.exceptions.Exit(outcome.exit_code)


def tell(outcome: Outcome) -> None:
    """Print what became of it: a success to standard output, a failure with its remedy."""
    if outcome.result is Result.DONE:
        show(outcome.line)
        return
    say(outcome.line)
    for line in outcome.remedy.splitlines():
        say(f"  {line}")


def give_up(verb: Verb, unit: str, error: UnitError, as_json: bool) -> NoReturn:
    """Print why PID 1 could not be asked about a unit, and end with the exit code for that."""
    finish(Outcome.of_error(verb, unit, error), as_json)


def plain(text: str) -> str:
    """Text that may come from a service, without what would steer a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, as systemctl prints them; the last column may be of any width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def progress_to(quiet: bool) -> Progress:
    """Where progress goes."""
    return (lambda text: None) if quiet else say


def say(text: str) -> None:
    """One line to standard error; a terminal that has gone must not stop an upgrade half-way."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """To standard output; a reader that has gone changes nothing of the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else the interpreter would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
