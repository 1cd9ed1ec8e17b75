# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the command line and environment of a main process as PID 1 would.

Derived from those of a control process, which PID 1 has made from the same unit file.
"""

from __future__ import annotations

import os
import re

from upgrader.protocol.rendezvous import EXECUTED, PREFLIGHT, PREFLIGHT_1, TAKEOVER, UPGRADE
from upgrader.protocol.values import Value
from upgrader.systemd.unit import UNSET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from upgrader.systemd.unit import Unit

#: `$$`, or `${NAME}`; one with a colon in it or without an end stays as it is.
_INSIDE = re.compile(r"\$\$|\$\{([^}:]*)(\}|:|\Z)")
_BLANKS = " \t\n\r"
#: The kernel gives no number as high as this one (PID_MAX_LIMIT).
_NOBODY = str(2**22 + 1)
#: Variables that PID 1 makes for one process, or for a start that an event has led to.
_OF_ONE_PROCESS = frozenset(
    (
        "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_EXEC_PID",
        "MAINPID", "MAINPIDFDID", "SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS",
        "REMOTE_ADDR", "REMOTE_PORT", "TRIGGER_UNIT", "TRIGGER_PATH",
        "TRIGGER_TIMER_REALTIME_USEC", "TRIGGER_TIMER_MONOTONIC_USEC",
        "MONITOR_SERVICE_RESULT", "MONITOR_EXIT_CODE", "MONITOR_EXIT_STATUS",
        "MONITOR_INVOCATION_ID", "MONITOR_UNIT",
    )
)  # fmt: skip
#: Variables that differ between two main processes of the same unit file, those of ours included.
PER_PROCESS = _OF_ONE_PROCESS | {
    "JOURNAL_STREAM", "WATCHDOG_PID", "WATCHDOG_USEC", "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE", "CREDENTIALS_DIRECTORY", TAKEOVER, UPGRADE, PREFLIGHT,
    PREFLIGHT_1, EXECUTED,
}  # fmt: skip
#: Where PID 1 looks for a program without a path, unless ExecSearchPath= is set.
_SEARCH_PATH = (
    "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin",
)  # fmt: skip


class MainCommand(Value):
    """What to execute."""

    path: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


def given_environment(pid: int | str = "self") -> dict[str, str]:
    """The environment that a process was started with, which `os.environ` is not: Python adds
    LC_CTYPE to its own. Raises OSError."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        return parse_environment(file.read())


def parse_environment(environ: bytes) -> dict[str, str]:
    """The variables in a file such as that."""
    items = environ.split(b"\0")
    return dict(os.fsdecode(item).partition("=")[::2] for item in items if b"=" in item)


def main_process(
    unit: Unit, control: Mapping[str, str], pid: int, running: Mapping[str, str]
) -> MainCommand:
    """Process `pid` as the main one of a unit, given the environment of one of its control processes,
    and that of the running one.

    What the running one was passed at its start (LISTEN_*) is in the words of the command line as at
    any start; in the environment it is meant for no process, as the FDs come another way.
    """
    own = {"SYSTEMD_EXEC_PID": str(pid)}
    if 0 < unit.watchdog_usec < UNSET:
        own |= {"WATCHDOG_PID": str(pid), "WATCHDOG_USEC": str(unit.watchdog_usec)}
    # What is set for the unit comes after that.
    own |= {n: v for n, v in control.items() if n not in _OF_ONE_PROCESS}
    if "CREDENTIALS_DIRECTORY" in running:
        own["CREDENTIALS_DIRECTORY"] = running["CREDENTIALS_DIRECTORY"]
    unset = unit.unset_environment
    environment = {n: v for n, v in own.items() if n not in unset and f"{n}={v}" not in unset}
    passed = {n: running[n] for n in ("LISTEN_FDS", "LISTEN_FDNAMES") if n in running}
    if passed:
        environment |= {**passed, "LISTEN_PID": _NOBODY}
    command = unit.exec_start[-1]
    arguments = list(command.arguments)
    if "no-env-expand" not in command.flags:
        own_pid = {"LISTEN_PID": str(pid)} if passed else {}
        arguments = expand(arguments, {**environment, **own_pid})
    path = command.path
    if "/" not in path:  # PID 1 looks it up when it starts it, and so do we
        path = _found(path, unit.exec_search_path or _SEARCH_PATH) or path
    return MainCommand(path, arguments, environment)


def _found(name: str, places: Sequence[str]) -> str | None:
    """The first executable file of that name."""
    for place in places:
        path = f"{place}/{name}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def expand(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Variables in a command line, by the rules of systemd.service(5), "Command lines".

    `${A}` anywhere is replaced; `$A` as a word of its own is split at white space, with quotes
    taken off, into none or more words; `$$` is a dollar sign. An unset variable is empty.
    """

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], "") if match[2] == "}" else match[0]

    words: list[str] = []
    for argument in arguments:
        if argument[:1] == "$" and argument[1:2] not in ("{", "$"):
            words += _split(environment.get(argument[1:], ""))
        else:
            words.append(_INSIDE.sub(replaced, argument))
    return words


def _split(text: str) -> list[str]:
    """Words as PID 1 takes them from a variable: a backslash keeps the next character, and a quote
    without its other half lasts to the end."""
    words: list[str] = []
    word: str | None = None
    quote, escaped = "", False
    for character in text:
        if word is None:
            if character in _BLANKS:
                continue
            word = ""
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "'\"":
            quote = character
        elif character in _BLANKS:
            words.append(word)
            word = None
        else:
            word += character
    return words if word is None else [*words, word]
