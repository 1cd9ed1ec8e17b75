# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line and environment of a main process, as PID 1 would make them; starts nothing.

Derived from those of a control process, which PID 1 has made from the same unit file.
"""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upgrader.systemd.unit import UNSET, Unit

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_WORD = re.compile(rf"\$({_NAME})")
_INSIDE = re.compile(rf"\$\$|\$\{{({_NAME})\}}")
#: Variables of a control process that a main process does not have, or has as its own.
_NOT_INHERITED = re.compile(r"MAINPID(FDID)?|LISTEN_.*|SYSTEMD_EXEC_PID|EXIT_.*|SERVICE_RESULT")
#: Variables that differ between two processes of the same unit file.
PER_PROCESS = re.compile(
    _NOT_INHERITED.pattern + r"|JOURNAL_STREAM|WATCHDOG_.*|MEMORY_PRESSURE_.*"
    r"|CREDENTIALS_DIRECTORY|TRIGGER_.*|MONITOR_.*|UPGRADER_TAKEOVER"
)


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute."""

    path: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


def main_process(unit: Unit, control: Mapping[str, str]) -> Command:
    """The main process of a unit, given the environment of one of its control processes."""
    environment = {n: v for n, v in control.items() if not _NOT_INHERITED.fullmatch(n)}
    if 0 < unit.watchdog_usec < UNSET:
        environment["WATCHDOG_USEC"] = str(unit.watchdog_usec)
    command = unit.exec_start[-1]
    arguments = list(command.arguments)
    if "no-env-expand" not in command.flags:
        arguments = arguments[:1] + expand(arguments[1:], environment)
    path = command.path
    if "/" not in path:  # PID 1 looks it up when it starts it, and so do we
        path = shutil.which(path, path=environment.get("PATH")) or path
    return Command(path, arguments, environment)


def expand(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Variables in a command line, by the rules of systemd.service(5), "Command lines".

    `${A}` anywhere is replaced; `$A` as a word of its own is split at white space, with quotes
    taken off, into none or more words; `$$` is a dollar sign. An unset variable is empty.
    """
    words: list[str] = []
    for argument in arguments:
        if match := _WORD.fullmatch(argument):
            words += _split(environment.get(match[1], ""))
        else:
            words.append(
                _INSIDE.sub(lambda m: environment.get(m[1], "") if m[1] else "$", argument)
            )
    return words


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its other half
        return text.split()
