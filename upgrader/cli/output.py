# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print results to standard output, progress and failures to standard error.

Lines for people go through `plain`, whoever has written what is in them, here or in a `Screen`; `print`
and its like are used nowhere else on this side, and `tests/unit/test_plain_text.py` looks for them.
"""

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

import click

from upgrader.cli.screen import Screen, Tone
from upgrader.errors import UpgradeError
from upgrader.tool.outcome import ExitCode, Outcome, Result, Tell, Verb
from upgrader.tool.plain_text import plain, plain_json
from upgrader.tool.unit_errors import UnitError


class OutputError(UpgradeError):
    """What was asked for cannot be written to standard output."""


def screen() -> Screen:
    """What there is behind standard output."""
    return Screen.of(sys.stdout)


# What became of a request stands, whether it can be printed or not


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Print an outcome, and end with its exit code."""
    if as_json:
        report_json(outcome.json())
    else:
        tell(outcome)
    raise click.exceptions.Exit(outcome.exit_code)


def tell(outcome: Outcome) -> None:
    """Print an outcome: a success to standard output, a failure with its remedy to standard error."""
    if outcome.result is Result.DONE:
        with _noted():
            show_document(told(screen(), outcome))
    else:
        _print_error(told(Screen.of(sys.stderr), outcome))


def told(there: Screen, outcome: Outcome) -> str:
    """Make the lines of an outcome."""
    done = outcome.result is Result.DONE
    remedy = [] if done else outcome.remedy.splitlines()
    lines = [there.wrapped("", outcome.line, Tone.NONE if done else Tone.BAD)]
    return "\n".join(lines + [there.wrapped("  ", line) for line in remedy])


def report_json(encoded: bytes | Iterable[bytes]) -> None:
    """Print what became of a request, or of several."""
    with _noted():
        show_json(encoded)


def give_up(verb: Verb, unit: str, error: UnitError, as_json: bool) -> NoReturn:
    """Print an error about a unit as an outcome, and end with its exit code."""
    finish(Outcome.of_error(verb, unit, error), as_json)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        say(f"upgrader: {error}")


# Lines


def progress_to(quiet: bool) -> Tell:
    """Return the function that shows progress."""
    return (lambda text: None) if quiet else say


def say(text: str) -> None:
    """Print a line to standard error. A terminal that is gone is no error: the upgrade goes on."""
    _print_error(plain(text))


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show(*lines: str) -> None:
    """Print lines to standard output; raises OutputError."""
    show_document("\n".join(map(plain, lines)))


def show_json(encoded: bytes | Iterable[bytes]) -> None:
    """Print one JSON value to standard output, or an array of several; raises OutputError."""
    one = encoded if isinstance(encoded, bytes) else b"[" + b",".join(encoded) + b"]"
    show_document(plain_json(one.decode()))


def show_document(text: str) -> None:
    """Print what is for programs, or what a screen has made, as it is.

    If the reader is gone, the exit code stays what it is. Raises OutputError if it cannot be written
    for another reason, such as a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Otherwise the interpreter would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            why = f"standard output cannot be written: {error.strerror}"
            raise OutputError(why) from error


def end_without_reader() -> None:
    """From now on, end this process as soon as nobody reads its standard output any more, as
    `journalctl --follow` does; for a command that only shows, and has no end of its own."""
    if sys.stdout is None:
        return
    gone = select.poll()
    gone.register(sys.stdout.fileno(), 0)

    def wait() -> None:
        gone.poll()
        os._exit(ExitCode.DONE)

    threading.Thread(target=wait, name="reader", daemon=True).start()
