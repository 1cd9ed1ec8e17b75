# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print results to standard output, progress and failures to standard error.

Lines for people go through `plain`, whoever has written what is in them; `print` and its like are used
nowhere else on this side, and `tests/unit/test_plain_text.py` looks for them.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

import click

from upgrader.systemd.unit import UnitError
from upgrader.tool.outcome import Outcome, Result, Tell, Verb
from upgrader.tool.plain_text import CELL, plain, plain_json


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Print an outcome, and end with its exit code."""
    if as_json:
        show_json(outcome.json())
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


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows in columns, as systemctl does; each row is a line, whatever is in its cells."""
    cells = [[plain(cell, CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def progress_to(quiet: bool) -> Tell:
    """Return the function that shows progress."""
    return (lambda text: None) if quiet else say


def say(text: str) -> None:
    """Print a line to standard error. A terminal that is gone is no error: the upgrade goes on."""
    with contextlib.suppress(OSError):
        print(plain(text), file=sys.stderr, flush=True)


def show(*lines: str) -> None:
    """Print lines to standard output."""
    show_document("\n".join(map(plain, lines)))


def show_json(encoded: bytes | Iterable[bytes]) -> None:
    """Print one JSON value to standard output, or an array of several."""
    one = encoded if isinstance(encoded, bytes) else b"[" + b",".join(encoded) + b"]"
    show_document(plain_json(one.decode()))


def show_document(text: str) -> None:
    """Print what is for programs, as it is. If the reader is gone, the exit code stays what it is."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Otherwise the interpreter would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
