# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the command line prints: results to standard output, progress and failures to standard error."""

import contextlib
import os
import sys

import click

from upgrader.outcome import Outcome, Result
from upgrader.upgrade import Progress


def finish(outcome: Outcome, as_json: bool) -> None:
    """Print what became of it, and end with its exit code."""
    if as_json:
        show(outcome.json().decode())
    elif outcome.result is Result.DONE:
        show(outcome.line)
    else:
        say(outcome.line)
        if outcome.remedy:
            for line in outcome.remedy.splitlines():
                say(f"  {line}")
    raise click.exceptions.Exit(outcome.exit_code)


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
