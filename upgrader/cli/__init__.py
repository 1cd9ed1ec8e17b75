# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the command line: read arguments, ask the tool for the work, print and exit.

There is one module for each family of commands.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import click

# Imported in the order in which the help lists the commands.
from upgrader.cli import list_status  # noqa: F401  # isort: skip
from upgrader.cli import check  # noqa: F401  # isort: skip
from upgrader.cli import adopt  # noqa: F401  # isort: skip
from upgrader.cli import upgrade_restart  # noqa: F401  # isort: skip
from upgrader.cli import set_cancel  # noqa: F401  # isort: skip
from upgrader.cli import history_dump  # noqa: F401  # isort: skip
from upgrader.cli import demo  # noqa: F401  # isort: skip
from upgrader.cli.group import EXIT_CODES, cli
from upgrader.cli.output import OutputError, say
from upgrader.errors import UpgradeError
from upgrader.tool.outcome import ExitCode

__all__ = ["DEBUG", "EXIT_CODES", "cli", "main"]

#: Set to show the traceback of an error that this tool did not expect.
DEBUG = "UPGRADER_DEBUG"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that everything temporary is removed."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has it ignored
            before[number] = signal.signal(number, unwind)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; raises SystemExit only."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does: text of any language
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _signals():
            code = cli.main(arguments, prog_name="upgrader", standalone_mode=False)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted; if systemd was given a job, it goes on: systemctl list-jobs")
        return ExitCode.INTERRUPTED
    except OutputError as error:
        say(f"upgrader: {error}")
        return ExitCode.NOTHING_DONE
    except UpgradeError as error:
        for line in f"upgrader: {error}".splitlines():
            say(line)
        return ExitCode.FAILED
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        say(
            f"upgrader: unexpected {type(error).__name__}: {error}"
            f" (this is a bug; {DEBUG}=1 in the environment shows the traceback)"
        )
        return ExitCode.NOT_SERVING
    return int(code or 0)
