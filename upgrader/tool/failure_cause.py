# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find in the journal why a start of a unit failed, in one line.

The journal is read through `journalctl -o json`: python-systemd would be one more package that
needs a compiler, for a file format that journalctl reads on every machine that has a journal.
"""

import contextlib
import signal
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from upgrader.systemd.unit import Unit
from upgrader.tool.journal_fields import namespaces, of_line, of_owners, of_unit, whole, whole_or

#: Of systemd's catalog (`journalctl --catalog`, sd-messages.h).
_PROCESS_EXIT = "98e322203f7a4ed290d09fe03c09fe15"
_SPAWN_FAILED = "641257651c1b4ec9a8624d7a40a9e1e7"
_UNIT_FAILED = "d9b373ed55a64feb8242e02dbe79a49c"

#: Only these many of the newest journal entries of the unit are read, and each so long at most.
_ENTRIES = 2000
_LINE = 500
_JOURNAL_SECONDS = 10

_PYTHON_UNCAUGHT = 1
_TRACEBACK = "Traceback (most recent call last):"
_FIELDS = (
    "MESSAGE", "MESSAGE_ID", "PRIORITY", "INVOCATION_ID", "_SYSTEMD_INVOCATION_ID", "_TRANSPORT",
    "_PID", "UPGRADER_OUTCOME", "UPGRADER_SIDE", "UPGRADER_ID", "UPGRADER_CODE",
    "UPGRADER_REASON", "EXIT_CODE", "EXIT_STATUS", "COMMAND", "UNIT_RESULT",
)  # fmt: skip


class CauseSource(StrEnum):
    """Who says it."""

    LIBRARY = "library"  #: the instance itself, through this library
    PROGRAM = "program"  #: the last line that the program wrote
    SYSTEMD = "systemd"  #: PID 1


@dataclass(frozen=True, slots=True)
class Cause:
    """Why it failed: one line, and who says so."""

    text: str
    source: CauseSource


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One journal entry; the invocation is that of the unit it is about."""

    message: str
    message_id: str
    transport: str
    priority: int
    pid: int
    invocation: str
    fields: Mapping[str, str]


def read(unit: Unit, since_usec: int, *, user: bool = False) -> tuple[JournalEntry, ...]:
    """The unit's journal entries of this boot since `since_usec` of CLOCK_MONOTONIC.

    `user`: of a user's service manager. Empty where there is no journal, or this user may not
    read it.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # What the program wrote last may still be on its way into the journal.
        _journalctl("--sync")
        if unit.log_namespace:
            _journalctl(f"--namespace={unit.log_namespace}", "--sync")
    try:
        text = _journalctl(
            "-b", "-n", str(_ENTRIES), "-o", "json", "--all", "-q", "--no-pager",
            f"--output-fields={','.join(_FIELDS)}", *namespaces(unit),
            *_matches(unit, user),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(parse(text.splitlines(), since_usec))


def _matches(unit: Unit, user: bool) -> list[str]:
    """What `journalctl -u` matches, and what the library reports."""
    pid_1 = [f"USER_UNIT={unit.id}"] if user else [f"UNIT={unit.id}", "_UID=0"]
    reported = [f"UPGRADER_UNIT={unit.id}", *of_owners(unit, user)]
    return [*of_unit(unit, user), "+", *pid_1, "+", *reported]


def parse(lines: Iterable[str], since_usec: int) -> Iterable[JournalEntry]:
    """Entries from `journalctl -o json`; lines that are no entry are skipped."""
    for line in lines:
        fields = of_line(line)
        if not fields or whole_or(fields.get("__MONOTONIC_TIMESTAMP", ""), 0) < since_usec:
            continue
        yield JournalEntry(
            message=fields.get("MESSAGE", ""),
            message_id=fields.get("MESSAGE_ID", ""),
            transport=fields.get("_TRANSPORT", ""),
            priority=whole_or(fields.get("PRIORITY", ""), 6),
            pid=whole_or(fields.get("_PID", ""), 0),
            invocation=fields.get("INVOCATION_ID") or fields.get("_SYSTEMD_INVOCATION_ID", ""),
            fields=fields,
        )


def cause(
    entries: Sequence[JournalEntry],
    unit: Unit,
    *,
    old_invocation: str = "",
    written: Sequence[str] = (),
) -> Cause:
    """Why the last failed start of `unit` failed; `old_invocation` is not a start and is left out.
    `written`: lines that went to a file, and not to the journal.

    Best first: what the library reported, what the program wrote last, what PID 1 says.
    """
    starts = [entry for entry in entries if entry.invocation != old_invocation]
    if text := reported(starts):
        return Cause(text, CauseSource.LIBRARY)
    ended = [entry for entry in starts if entry.fields.get("UNIT_RESULT") or _is_main_exit(entry)]
    result, code, status = unit.result, _CODES.get(unit.exec_main_code, ""), unit.exec_main_status
    if ended:
        last = ended[-1].invocation
        # Of a process that ended before journald got to its last words, the invocation is not known.
        since = next(n for n, entry in enumerate(starts) if entry.invocation == last)
        starts = [entry for entry in starts[since:] if entry.invocation in (last, "")]
        results = [entry.fields["UNIT_RESULT"] for entry in starts if "UNIT_RESULT" in entry.fields]
        # That PID 1 gave up says nothing of what made it give up.
        result = next(
            (each for each in results if each != "start-limit-hit"), (*results, result)[0]
        )
        for entry in starts:
            if _is_main_exit(entry):
                code = entry.fields.get("EXIT_CODE", code)
                status = _exit_status(entry.fields.get("EXIT_STATUS", ""), status)
    for entry in starts:
        if entry.message_id == _SPAWN_FAILED:
            return Cause(_line(entry.message), CauseSource.SYSTEMD)
    words = _words(result, code, status, unit)
    if result == "exit-code" and (line := _last_line(_lines(starts) or written, status)):
        return Cause(f"{words}: {line}", CauseSource.PROGRAM)
    return Cause(words, CauseSource.SYSTEMD)


def reported(entries: Sequence[JournalEntry], upgrade: str = "") -> str:
    """The last failure that the library reported, or nothing; of the upgrade of that id only."""
    for entry in reversed(entries):
        fields = entry.fields
        own = not upgrade or fields.get("UPGRADER_ID") == upgrade
        if own and fields.get("UPGRADER_OUTCOME") == "failed":
            return _line(fields.get("UPGRADER_REASON") or entry.message)
    return ""


def ended(unit: Unit) -> str:
    """How the last main process of a unit has ended, by PID 1."""
    if _CODES.get(unit.exec_main_code) in ("killed", "dumped"):
        return _killed(unit.exec_main_status)
    return f"the main process ended meanwhile, with status {unit.exec_main_status}"


def ended_well(unit: Unit) -> bool:
    """Whether the last main process of a unit has exited with status 0, by PID 1."""
    return (_CODES.get(unit.exec_main_code), unit.exec_main_status) == ("exited", 0)


def killed(entries: Sequence[JournalEntry]) -> str:
    """By what a main process was killed; "" if none was."""
    for entry in entries:
        fields = entry.fields
        if _is_main_exit(entry) and fields.get("EXIT_CODE") in ("killed", "dumped"):
            return _killed(_exit_status(fields.get("EXIT_STATUS", ""), 0))
    return ""


def _killed(status: int) -> str:
    return f"the main process was killed by {_signal(status)} meanwhile"


def last_words(entries: Sequence[JournalEntry], others: Collection[int] = ()) -> str:
    """What a process that ended wrote last, or the exception it ended with; "" if nothing.

    `others`: processes whose words these are not.
    """
    of_it = _lines([entry for entry in entries if entry.pid not in others])
    return _last_line(of_it, _PYTHON_UNCAUGHT)


def exception(lines: Sequence[str]) -> str:
    """The exception that the last Python traceback in these lines names; "" if there is none."""
    return _last_line(lines, _PYTHON_UNCAUGHT) if _TRACEBACK in lines else ""


def _is_main_exit(entry: JournalEntry) -> bool:
    return entry.message_id == _PROCESS_EXIT and entry.fields.get("COMMAND") == "ExecStart"


def _lines(entries: Sequence[JournalEntry]) -> list[str]:
    return [entry.message for entry in entries if entry.transport == "stdout"]


def _last_line(lines: Sequence[str], status: int) -> str:
    """What the program wrote last; of a Python traceback, the line that names the exception."""
    if status == _PYTHON_UNCAUGHT and _TRACEBACK in lines:
        start = len(lines) - lines[::-1].index(_TRACEBACK)
        for line in lines[start:]:
            if line and not line[0].isspace():
                return _line(line)
    return next((_line(line) for line in reversed(lines) if line.strip()), "")


def _words(result: str, code: str, status: int, unit: Unit) -> str:
    """PID 1's `Result` (systemd.service(5), $SERVICE_RESULT) in plain words."""
    match result:
        case "exit-code" if code != "exited":
            return "a command of the unit failed"
        case "exit-code":
            return f"the new instance exited with status {status}"
        case "signal" | "core-dump":
            dumped = " and dumped core" if result == "core-dump" else ""
            return f"the new instance was killed by {_signal(status)}{dumped}"
        case "timeout":
            seconds = unit.timeout_start_usec / 1e6
            return f"the new instance was not ready within TimeoutStartSec={seconds:g}s"
        case "protocol":
            return "the new instance ended without ever being ready"
        case "watchdog":
            return "the new instance did not answer the watchdog in time"
        case "start-limit-hit":
            return "too many starts in too short a time (StartLimitBurst=)"
        case "oom-kill":
            return "the kernel killed the new instance because memory ran out"
        case "resources":
            return "systemd could not set up the new instance"
        case "success" | "":
            return "systemd gives no reason"
        case _:
            return f"systemd says {result}"


#: siginfo codes of waitid(2), in the words of the journal.
_CODES = {1: "exited", 2: "killed", 3: "dumped"}


def _exit_status(text: str, default: int) -> int:
    with contextlib.suppress(ValueError):
        return whole(text)
    with contextlib.suppress(KeyError):
        return signal.Signals[f"SIG{text.removeprefix('SIG')}"].value
    return default


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return first if len(first) <= _LINE else first[: _LINE - 1] + "…"


def _journalctl(*arguments: str) -> str:
    done = subprocess.run(
        ["journalctl", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_JOURNAL_SECONDS,
        check=True,
    )
    return done.stdout.decode(errors="replace")
