# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the command line of a program that a runner starts from that which systemd started."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from upgrader.protocol.programs import Program, look_up, program_name
from upgrader.systemd.unit import ExecCommand

#: They run what their first argument names that is no option.
_INTERPRETERS = {"python", "pypy", "ruby", "perl", "php", "sh", "bash", "dash", "env"}
#: Prefixes of a command line in a unit, by PID 1's words for them; systemd.service(5), "Command lines".
_PREFIXES = {
    "no-env-expand": ":",
    "privileged": "+",
    "no-setuid": "!",
    "ambient": "!!",
}
_DAEMON = re.compile(r"\bdaemon\s+on\s*;")
#: Of uvicorn, what it binds itself: `--uds` is a path, and the others go together.
_UVICORN_BINDS = ("--host", "--port", "--uds", "--fd")


class NotRewritten(ValueError):
    """This command line cannot be that of a runner's program; the text says why."""


@dataclass(frozen=True, slots=True)
class FoundProgram:
    """The program of a unit: its name in the table of programs, what is known of it, and whether its
    own command line is known, which that of a script that starts it is not."""

    name: str
    program: Program
    known: bool
    named: bool


def find(line: ExecCommand, executable: str) -> FoundProgram:
    """The program that a line of ExecStart= runs, given the file that its main process is executing;
    raises ValueError for a file of an admin that cannot be read."""
    words = [line.path, *line.arguments[1:]]
    named = _named(words)
    for path, own in ((words[0], True), (named, True), (executable, False)):
        if path and (program := look_up(path)):
            return FoundProgram(program_name(path), program, known=True, named=own)
    return FoundProgram(program_name(named or words[0]), Program(), known=False, named=True)


def _named(words: Sequence[str]) -> str:
    """The script or module that an interpreter runs; empty if it runs none."""
    if program_name(words[0]) not in _INTERPRETERS:
        return ""
    others = iter(words[1:])
    for word in others:
        if word == "-m":
            return next(others, "")
        if not word.startswith("-"):
            return word
    return ""


def rewritten(
    found: FoundProgram, line: ExecCommand, names: Sequence[str], *, forking: bool
) -> list[str]:
    """The words that start the program in the foreground, on listeners of these names; `forking`:
    it leaves the foreground by now. Raises NotRewritten."""
    words = [line.path, *line.arguments[1:]]
    if not (found.known and found.named):
        return words
    words = [word for word in words if word not in found.program.background]
    at = 1
    if os.path.basename(words[0]) != found.name and found.name in map(program_name, words[1:]):
        at = 1 + [program_name(word) for word in words].index(found.name, 1)
    if missing := [word for word in found.program.foreground if word not in words]:
        words[at:at] = missing
    if found.name == "nginx":
        return _nginx(words) if forking or "-g" in words else words
    if found.name == "uvicorn":
        return _uvicorn(words, at, names)
    return words


def _nginx(words: list[str]) -> list[str]:
    """Of `-g` there may be one only; https://nginx.org/en/docs/switches.html."""
    if "-g" not in words:
        return [*words, "-g", "daemon off;"]
    at = words.index("-g") + 1
    directives = words[at] if at < len(words) else ""
    if not re.search(r"\bdaemon\b", directives):
        directives = f"daemon off; {directives}"
    return [*words[:at], _DAEMON.sub("daemon off;", directives), *words[at + 1 :]]


def _uvicorn(words: list[str], at: int, names: Sequence[str]) -> list[str]:
    """It takes one FD, in place of the address that it would bind."""
    if len(names) != 1:
        raise NotRewritten("uvicorn takes one listener")
    kept = []
    others = iter(words)
    for word in others:
        if word in _UVICORN_BINDS:
            next(others, None)
        elif word.partition("=")[0] not in _UVICORN_BINDS:
            kept.append(word)
    if "--reload" in kept:
        raise NotRewritten("uvicorn --reload is for development")
    return [*kept[:at], "--fd", f"{{fd:{names[0]}}}", *kept[at:]]


def prefix(line: ExecCommand) -> str:
    """The prefixes that decide how a command line is read, and with which privileges it runs."""
    return "".join(sign for flag, sign in _PREFIXES.items() if flag in line.flags)


def quoted(words: Sequence[str]) -> str:
    """A command line as a unit file has it, in which variables are still variables;
    systemd.syntax(7), "Quoting"."""
    return " ".join(_quoted(word.replace("%", "%%")) for word in words)


def _quoted(word: str) -> str:
    if re.fullmatch(r"[^\s\"'\\;]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
